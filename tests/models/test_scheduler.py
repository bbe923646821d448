"""Facts about the levels that a pipeline's own scheduler walks, and about what is refused of it."""

from __future__ import annotations

import importlib.util
import inspect
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from flowalign.config.sections import ModelConfig
from flowalign.flow.schedule import PipelineSchedule, sigmas
from flowalign.models.errors import ModelError
from flowalign.models.inspect import own_schedule
from flowalign.models.scheduler import DEFAULTS, FlowScheduler, check_scheduler, checked_options
from tests.tiny import write_configs_of_a_pipeline

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks" / "grids.py"
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_configs_of_a_pipeline(tmp_path / "model")


def rewrite(directory: Path, file: str = "scheduler/scheduler_config.json", **options: Any) -> Path:
    path = directory / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    return directory


def walk(directory: Path, height: int | None = None, width: int | None = None) -> PipelineSchedule:
    return own_schedule(ModelConfig(path=str(directory), height=height, width=width))


def test_the_known_options_and_their_defaults_are_those_of_the_scheduler() -> None:
    signature = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__)
    assert {name: p.default for name, p in signature.parameters.items() if name != "self"} == DEFAULTS


def test_levels_follow_diffusers_over_a_sweep_of_options() -> None:
    spec = importlib.util.spec_from_file_location("grids", SCRIPT)
    assert spec is not None and spec.loader is not None
    grids: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grids)
    found = grids.parity(every=31)
    assert found["cases"] > 100 and found["worst"] <= 2e-7


def test_a_static_scheduler_walks_the_grid_of_0_1(directory: Path) -> None:
    own = walk(directory)
    assert own.is_static and own.shift == 2.5
    for num_steps in (1, 4, 10):
        assert torch.equal(own.levels(num_steps), sigmas(num_steps, 2.5))


@pytest.mark.parametrize(("size", "tokens"), [((64, 64), 16), ((64, 32), 8), ((32, 32), 4)])
def test_a_dynamic_shift_follows_the_size(directory: Path, size: tuple[int, int], tokens: int) -> None:
    rewrite(directory, **DYNAMIC, base_image_seq_len=4, max_image_seq_len=16)
    own = walk(directory, *size)
    mu = 0.5 + (1.15 - 0.5) * (tokens - 4) / 12
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(6, mu=mu)
    assert own.dynamic and own.shift == pytest.approx(torch.tensor(mu).exp().item())
    torch.testing.assert_close(own.levels(6), torch.as_tensor(scheduler.sigmas), rtol=0, atol=1e-6)


def test_a_dynamic_shift_at_one_size_is_a_static_one_of_the_paper_s_grid(directory: Path) -> None:
    rewrite(directory, **DYNAMIC)
    own = walk(directory)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=float(torch.tensor(own.shift).log()))
    torch.testing.assert_close(own.levels(4, grid="paper"), torch.as_tensor(scheduler.sigmas), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [DYNAMIC, {"use_karras_sigmas": True}, {"shift_terminal": 0.1, **DYNAMIC}])
def test_a_configured_shift_is_a_static_one_of_the_same_scheduler(directory: Path, options: dict[str, Any]) -> None:
    rewrite(directory, **options)
    plain = {**options, "use_dynamic_shifting": False}
    scheduler = FlowMatchEulerDiscreteScheduler(**plain, shift=4.0)
    scheduler.set_timesteps(5)
    own = walk(directory)
    torch.testing.assert_close(own.levels(5, 4.0), torch.as_tensor(scheduler.sigmas), rtol=0, atol=1e-6)
    assert "shift 4 replaces" in (own.replacement(4.0) or "")


def test_auto_is_the_own_shift_times_the_root_of_the_size_over_the_model_s_own(directory: Path) -> None:
    assert walk(directory).shift_of("auto") == 2.5 and walk(directory).replacement(2.5) is None
    assert walk(directory).replacement("auto") == "shift 2.5 (auto), which is the model's scheduler's own"
    half = walk(directory, 32, 64)
    assert half.shift_of("auto") == pytest.approx(2.5 * 0.5**0.5)
    assert torch.equal(half.levels(4, "auto"), sigmas(4, half.shift_of("auto") or 0))
    with pytest.raises(ValueError, match="shift: auto is for a static shift"):
        walk(rewrite(directory, **DYNAMIC)).levels(4, "auto")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"invert_sigmas": True}, "invert_sigmas walks from data to noise"),
        ({"stochastic_sampling": True}, "stochastic_sampling noises every step anew"),
        ({"prediction_type": "flow_prediction"}, "the option prediction_type is none of"),
        ({"sigma_min": 0.01}, "the option sigma_min is none of"),
        ({"_class_name": "UniPCMultistepScheduler"}, "has a UniPCMultistepScheduler"),
        ({"_class_name": "EulerDiscreteScheduler"}, "has a EulerDiscreteScheduler"),
        ({"time_shift_type": "cubic"}, "time_shift_type is 'cubic'; write exponential or linear"),
        ({"shift": "three"}, "shift is 'three'; write a number above 0"),
        ({"shift": 0}, "shift is 0; write a number above 0"),
        ({"shift": True}, "shift is True; write a number above 0"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0; write a whole number"),
        ({"num_train_timesteps": 999.0}, "num_train_timesteps is 999.0; write a whole number"),
        ({"use_karras_sigmas": "yes"}, "use_karras_sigmas is 'yes'; write true or false"),
        ({"shift_terminal": 1.0}, "shift_terminal is 1.0; write null or"),
        ({"use_dynamic_shifting": True, "base_shift": None}, "base_shift is None; write a number"),
        ({"use_dynamic_shifting": True, "max_image_seq_len": 256}, "are one number"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of use_karras_sigmas"),
    ],
)
def test_what_is_not_followed_is_refused_by_name(directory: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=r"^model\.path: ") as error:
        check_scheduler(rewrite(directory, **options))
    assert said in str(error.value)


def test_a_file_that_diffusers_cannot_read_is_refused(directory: Path) -> None:
    file = directory / "scheduler" / "scheduler_config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    with pytest.raises(ModelError, match="begins with a byte order mark"):
        check_scheduler(directory)


def test_a_scheduler_that_the_index_names_is_refused_too(directory: Path) -> None:
    rewrite(directory, "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    with pytest.raises(ModelError, match="DPMSolverMultistepScheduler"):
        check_scheduler(directory)


@pytest.mark.parametrize("text", ["{", "[]", "\xff", '{"shift": NaN}'])
def test_a_malformed_scheduler_file_is_named(directory: Path, text: str) -> None:
    (directory / "scheduler" / "scheduler_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"scheduler_config\.json"):
        check_scheduler(directory)
    (directory / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ModelError, match="is missing"):
        check_scheduler(directory)


def test_noise_in_every_step_is_allowed_to_a_consistency_student_of_ours_alone(directory: Path) -> None:
    rewrite(directory, stochastic_sampling=True)
    record = directory / "flowalign.json"
    record.write_text(json.dumps({"sampling": {"solver": "euler"}}))
    with pytest.raises(ModelError, match="stochastic_sampling"):
        check_scheduler(directory)
    record.write_text(json.dumps({"sampling": {"solver": "consistency"}}))
    assert check_scheduler(directory)["stochastic_sampling"]


@pytest.mark.parametrize(
    "options", [{"shift_terminal": 0.1}, {"use_dynamic_shifting": True, "time_shift_type": "linear"}]
)
def test_a_number_of_steps_without_levels_is_refused(options: dict[str, Any]) -> None:
    """One step of a terminal shift is 0 / 0, a linear shift by a negative mu leaves [0, 1]; diffusers says nothing."""
    scheduler = FlowScheduler(checked_options(options), -0.5 if "time_shift_type" in options else None)
    with pytest.raises(ValueError, match="num_steps: the walk of"):
        scheduler.schedule().levels(1 if "shift_terminal" in options else 6)
