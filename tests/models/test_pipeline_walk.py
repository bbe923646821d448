"""Facts about ``grid: pipeline``: a run, a sample and an export walk what ``pipe(...)`` walks, or are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from flowalign.algorithms import build_algorithm
from flowalign.algorithms.progressive import Progressive
from flowalign.algorithms.rectified_flow import RectifiedFlow
from flowalign.cli import app
from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.config.sections import SHIPPED, ModelConfig, SamplingConfig
from flowalign.export import export
from flowalign.export.verify import load_pipeline
from flowalign.flow.schedule import sigmas
from flowalign.intake.changes import refuse_changes
from flowalign.intake.file import RESOLVED, load_align
from flowalign.intake.recorded import config_of
from flowalign.intake.resolved import read_resolved, write_resolved
from flowalign.making.merge import merge
from flowalign.models.build import load_policy
from flowalign.models.guided import guided
from flowalign.models.inspect import own_schedule
from flowalign.run.fixed import build_run, lines_on_data
from flowalign.samples.opened import open_policy, policy_plan
from flowalign.samples.rollout import SampleNoise, integrate
from tests.algorithms.every import plan_of
from tests.tiny import run_config, write_checkpoint, write_config, write_configs_of_a_pipeline

PROMPTS = ["a photo of a red circle", "a photo of two blue squares"]
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64, "max_shift": 1.8}
WALKS = {
    "static": ({"shift": 3.0}, (64, 64)),
    "dynamic-48": (DYNAMIC, (48, 48)),
    "dynamic-64": (DYNAMIC, (64, 64)),
    "dynamic-64x32": (DYNAMIC, (64, 32)),
    "linear": ({**DYNAMIC, "time_shift_type": "linear"}, (64, 64)),
    "karras": ({"shift": 1.18, "use_karras_sigmas": True}, (64, 64)),
    "exponential": ({**DYNAMIC, "use_exponential_sigmas": True}, (32, 64)),
    "beta": ({"shift": 2.0, "use_beta_sigmas": True}, (64, 64)),
    "terminal": ({**DYNAMIC, "shift_terminal": 0.1}, (64, 64)),
    "half-the-training-times": ({"num_train_timesteps": 500, "shift": 1.32}, (64, 64)),
}


def shapes_with(directory: Path, options: dict[str, Any]) -> Path:
    """The shipped pipeline with other options of its scheduler."""
    directory.mkdir(parents=True)
    for part in (SHIPPED / "pipeline").iterdir():
        if part.name != "scheduler":
            (directory / part.name).symlink_to(part)
    (directory / "scheduler").mkdir()
    written = json.loads((SHIPPED / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps({**written, **options}))
    return directory


def tiny_with(directory: Path, tiny_pipeline_dir: Path, options: dict[str, Any]) -> Path:
    """The tiny random pipeline with a scheduler of these options."""
    directory.mkdir()
    for part in tiny_pipeline_dir.iterdir():
        if part.name != "scheduler":
            (directory / part.name).symlink_to(part)
    (directory / "scheduler").mkdir()
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(options))
    return directory


def rewrite(model: Path, **options: Any) -> None:
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


@pytest.mark.parametrize("name", WALKS)
def test_our_latents_are_those_of_the_public_pipeline(tmp_path: Path, name: str) -> None:
    options, (height, width) = WALKS[name]
    model = ModelConfig(
        path=str(shapes_with(tmp_path / "model", options)), max_sequence_length=2, height=height, width=width
    )
    policy = load_policy(model)
    plan = policy_plan(policy, SamplingConfig(num_steps=5, guidance_scale=2.0), model)
    shape = policy.network.latent_shape(height, width)
    ours = integrate(
        guided(policy.network), policy.encoders.encode_prompts(PROMPTS, 2), SampleNoise(3, (0, 1), shape), plan
    )[2]
    public: Any = load_pipeline(Path(model.path))
    theirs: torch.Tensor = public(
        PROMPTS,
        height=height,
        width=width,
        latents=SampleNoise(3, (0, 1), shape).draw(),
        num_inference_steps=5,
        guidance_scale=2.0,
        max_sequence_length=2,
        output_type="latent",
    ).images
    # The shipped network does what words say, and magnifies rounding where they decide: 1.3e-5 on a Karras walk.
    assert float((ours - theirs).abs().max()) <= 5e-5 * float(theirs.abs().max())


def test_rollouts_evaluations_and_samples_of_a_run_walk_one_grid(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    rewrite(tmp_path / "model", **DYNAMIC)
    config = load_align(path, ["model.height=32", "evaluation.num_steps=10"]).config
    assert config.algorithm["grid"] == "pipeline" and config.algorithm["shift"] is None
    own = own_schedule(config.model)
    expected = tuple(own.levels(10).tolist())
    assert own.dynamic and expected != tuple(own_schedule(ModelConfig(path=config.model.path)).levels(10).tolist())
    run = build_run(config)
    assert plan_of(run.algorithm).sigmas == expected
    assert run.evaluation is not None and run.evaluation[1].sigmas == expected


@pytest.mark.parametrize(
    "algorithm",
    [
        {"type": "nft"},
        {"type": "awm", "num_steps": 10},
        {"type": "sft"},
        {"type": "diffusion_dpo"},
        {"type": "opd", "teachers": {"a": {"path": "shapes"}}},
        {"type": "flow_grpo", "granularities": [1, 2], "window": {"kind": "fixed", "start": 1, "size": 1}},
    ],
    ids=lambda algorithm: algorithm["type"],
)
def test_every_algorithm_that_rolls_out_walks_the_model_s_own_levels(tmp_path: Path, algorithm: Any) -> None:
    own = own_schedule(ModelConfig(path=str(shapes_with(tmp_path / "model", DYNAMIC))))
    assert plan_of(build_algorithm(algorithm, own)).sigmas == tuple(own.levels(10).tolist())


def test_a_configured_shift_replaces_the_scheduler_s_and_one_line_says_so(tmp_path: Path) -> None:
    model = shapes_with(tmp_path / "model", DYNAMIC)
    path = write_config(tmp_path)
    small = [f"model={{path: {model}, max_sequence_length: 2}}", "evaluation.every=0"]
    config = load_align(path, [*small, "algorithm.shift=3"]).config
    run = build_run(config)
    assert plan_of(run.algorithm).sigmas == tuple(sigmas(10, 3.0).tolist())
    assert [line for line in lines_on_data(config, run) if "shift" in line] == [
        "levels: shift 3 replaces the model's scheduler's: its dynamic one, 2.138 at this size, which evaluation, "
        "samples and exports keep"
    ]
    config = load_align(path, small).config
    assert not any("shift" in line for line in lines_on_data(config, build_run(config)))


def test_auto_stays_in_the_configuration_and_follows_the_size(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    config = load_align(path, ["algorithm.shift=auto", "model.height=32"]).config
    assert config.algorithm["shift"] == "auto"
    assert plan_of(build_run(config).algorithm).sigmas == tuple(sigmas(10, 2.5 * 0.5**0.5).tolist())
    rewrite(tmp_path / "model", **DYNAMIC)
    with pytest.raises(ConfigError, match=r"algorithm\.shift: auto is for a static shift"):
        load_align(path, ["algorithm.shift=auto"])


@pytest.mark.parametrize("value", ["0", "-1", "true", "automatic", "[1]"])
def test_a_shift_that_is_none_is_refused_by_its_key(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"^algorithm\.shift: got .* write a number above 0, auto or null$"):
        load_align(write_config(tmp_path), [f"algorithm.shift={value}"])


@pytest.mark.parametrize("options", [{"invert_sigmas": True}, {"stochastic_sampling": True}, {"beta_start": 0.1}])
def test_what_is_not_reproduced_is_refused_in_the_model_and_in_a_teacher(tmp_path: Path, options: Any) -> None:
    path = write_config(tmp_path)
    rewrite(write_configs_of_a_pipeline(tmp_path / "other"), **options)
    option = next(iter(options))
    with pytest.raises(ConfigError, match=rf"^model\.path: .*{option}"):
        load_align(path, ["model.path=other"])
    with pytest.raises(ConfigError, match=rf"^algorithm\.teachers\.a\.path: .*{option}"):
        load_align(path, ["algorithm={type: opd, teachers: {a: {path: other}}}"])
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["sample", str(tmp_path / "other"), "--prompt", "a star", "--out", str(out)])
    assert done.exit_code == 2 and option in done.output and not out.exists()


def test_a_user_is_told_the_new_name_of_the_grid(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    for key in ("algorithm.grid", "evaluation.grid"):
        with pytest.raises(ConfigError, match=rf"^{key}: diffusers is called pipeline now"):
            load_align(path, [f"{key}=diffusers"])
    with pytest.raises(ConfigError, match="diffusers is called pipeline now"):
        load_align(path, ["algorithm={type: nft, grid: diffusers}"])
    with pytest.raises(ConfigError, match=r"^algorithm\.grid: got 'papers'; write pipeline or paper$"):
        load_align(path, ["algorithm.grid=papers"])
    path.write_text(path.read_text().replace("num_steps: 10", "num_steps: 10, grid: diffusers"))
    with pytest.raises(ConfigError, match=r"^algorithm\.grid: diffusers is called pipeline now"):
        load_align(path)


def written_by_0_1(path: Path, run_dir: Path) -> AlignConfig:
    """A run's ``config.yaml`` as 0.1 wrote it: its grids are called ``diffusers``, its shift is a number."""
    config = load_align(path).config
    shift = json.loads((Path(config.model.path) / "scheduler" / "scheduler_config.json").read_text())["shift"]
    old = config.model_copy(
        update={
            "algorithm": {**config.algorithm, "grid": "diffusers", "shift": shift},
            "evaluation": config.evaluation.model_copy(update={"grid": "diffusers"}),
        }
    )
    write_resolved(old, run_dir)
    return old


def test_a_run_of_0_1_continues_where_the_pipeline_walks_its_static_grid(tmp_path: Path) -> None:
    path, run_dir = write_config(tmp_path), tmp_path / "run"
    old = written_by_0_1(path, run_dir)
    new = load_align(path).config
    assert old != new and read_resolved(run_dir).algorithm["grid"] == "diffusers"  # type: ignore[union-attr]
    refuse_changes(read_resolved(run_dir), new, run_dir)
    plans = [build_run(config) for config in (old, new)]
    assert plans[0].algorithm.plan(0, 0) == plans[1].algorithm.plan(0, 0)
    assert plans[0].evaluation is not None and plans[1].evaluation is not None
    assert plans[0].evaluation[1] == plans[1].evaluation[1]


def test_a_run_of_0_1_on_another_walk_goes_on_from_its_own_file_alone(tmp_path: Path) -> None:
    path, run_dir = write_config(tmp_path), tmp_path / "run"
    rewrite(tmp_path / "model", **DYNAMIC)
    written_by_0_1(path, run_dir)
    with pytest.raises(ConfigError, match=r"begun by version 0\.1 on a static grid.*continue it with its own"):
        refuse_changes(read_resolved(run_dir), load_align(path).config, run_dir)
    again = load_align(run_dir / RESOLVED).config
    refuse_changes(read_resolved(run_dir), again, run_dir)
    run = build_run(again)
    assert plan_of(run.algorithm).sigmas == tuple(sigmas(10, 2.5).tolist())
    assert run.evaluation is not None and run.evaluation[1].sigmas == tuple(sigmas(10, 2.5).tolist())
    with pytest.raises(ConfigError, match="called pipeline now"):
        load_align(run_dir / RESOLVED, ["algorithm.grid=diffusers"])


def test_an_export_of_0_1_is_sampled_along_its_static_grid(tmp_path: Path) -> None:
    model = shapes_with(tmp_path / "model", {"shift": 3.0})
    (model / "flowalign.json").unlink(missing_ok=True)
    (model / "flowalign.json").write_text(json.dumps({"sampling": {"num_steps": 4, "grid": "diffusers"}}))
    config = config_of(model, None)
    policy, _ = open_policy(model, config)
    assert policy_plan(policy, config.evaluation, config.model).sigmas == tuple(sigmas(4, 3.0).tolist())


def test_a_run_of_0_1_is_not_read_where_its_network_was_told_other_times(tmp_path: Path) -> None:
    path, run_dir = write_config(tmp_path), tmp_path / "run"
    written_by_0_1(path, run_dir)
    rewrite(tmp_path / "model", num_train_timesteps=500)
    with pytest.raises(ConfigError, match=r"algorithm\.grid: the walk of version 0\.1 took 1000"):
        load_align(run_dir / RESOLVED)


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        (DYNAMIC, {"grid": "pipeline"}),
        (DYNAMIC, {"grid": "paper"}),
        (DYNAMIC, {"grid": "diffusers"}),
        ({"use_karras_sigmas": True, "shift": 2.0}, {"grid": "pipeline"}),
        ({"use_karras_sigmas": True, "shift": 2.0}, {"grid": "paper"}),
        ({"num_train_timesteps": 500}, {"grid": "pipeline", "solver": "consistency"}),
    ],
    ids=["dynamic", "dynamic-paper", "dynamic-0.1", "karras", "karras-paper", "consistency"],
)
def test_every_export_loads_and_samples_again_along_the_run_s_levels(
    tmp_path: Path, tiny_pipeline_dir: Path, options: dict[str, Any], sampling: dict[str, Any]
) -> None:
    """The export itself compares the latents of ``pipe(...)`` with ours before it is kept."""
    base = tiny_with(tmp_path / "base", tiny_pipeline_dir, options)
    config = run_config(base, evaluation={"num_samples": 4, "num_steps": 4, **sampling})
    write_checkpoint(tmp_path / "run", config)
    made = export(tmp_path / "run", tmp_path / "out", config=config)
    assert made.latents_error <= 1e-5
    again = config_of(tmp_path / "out", None)
    plan = policy_plan(open_policy(tmp_path / "out", again)[0], again.evaluation, again.model)
    policy, _ = open_policy(tmp_path / "run", config)
    assert plan == policy_plan(policy, config.evaluation, config.model)
    assert own_schedule(again.model).num_train_timesteps == options.get("num_train_timesteps", 1000)


def test_a_consistency_student_is_aligned_teaches_and_is_merged(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    config = run_config(tiny_pipeline_dir, evaluation={"num_samples": 4, "num_steps": 2, "solver": "consistency"})
    write_checkpoint(tmp_path / "run", config)
    student = export(tmp_path / "run", tmp_path / "student", config=config).path
    written = json.loads((student / "scheduler" / "scheduler_config.json").read_text())
    assert written["stochastic_sampling"]
    path = write_config(tmp_path)
    assert load_align(path, [f"model.path={student}"]).config.model.path == str(student)
    taught = f"algorithm={{type: opd, teachers: {{a: {{path: {student}}}}}}}"
    load_align(path, [f"model.path={tiny_pipeline_dir}", taught])
    merge([student, student], tmp_path / "merged")
    again = config_of(tmp_path / "merged", None)
    assert again.evaluation.solver == "consistency" and again.evaluation.num_steps == 2
    open_policy(tmp_path / "merged", again)


def test_a_lora_cannot_be_sampled_on_the_paper_s_grid_beside_a_conversion(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    rewrite(tmp_path / "model", use_karras_sigmas=True)
    load_align(path, ["evaluation.grid=paper"])
    with pytest.raises(ConfigError, match=r"^evaluation\.grid: paper cannot be sampled with a LoRA"):
        load_align(path, ["evaluation.grid=paper", "model.lora={rank: 4}"])


def test_one_step_of_a_terminal_shift_is_refused_before_anything_starts(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    rewrite(tmp_path / "model", shift_terminal=0.1)
    with pytest.raises(ConfigError, match=r"^evaluation\.num_steps: the walk of 1 steps .* begins nan"):
        load_align(path, ["evaluation.num_steps=1"])


def test_an_algorithm_that_makes_its_own_levels_is_refused_beside_a_dynamic_shift(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    (tmp_path / "own.py").write_text(
        "from flowalign.algorithm import Algorithm, AlgorithmConfig, Needs\n"
        "from flowalign.flow.schedule import sigmas\n"
        "from flowalign.types import Noise, Trajectories, SamplingPlan\n"
        "class Own(Algorithm):\n"
        "    class Config(AlgorithmConfig):\n"
        "        group_size: int = 4\n"
        "        shift: float | None = None\n"
        "    needs = Needs(Trajectories, scores=True, group_size=4)\n"
        "    def plan(self, iteration, seed):\n"
        "        return SamplingPlan(tuple(sigmas(4, self.config.shift or 1.0).tolist()), Noise('flow', 0.7, (0, 2)))\n"
        "    def credit(self, batch, scores): ...\n"
        "    def loss(self, models, minibatch): ...\n"
    )
    overrides = ["algorithm={type: 'own.py:Own'}"]
    load_align(path, overrides)
    rewrite(tmp_path / "model", **DYNAMIC)
    with pytest.raises(ConfigError, match=r"^algorithm\.shift: is null, and this algorithm makes levels of its own"):
        load_align(path, overrides)
    load_align(path, ["algorithm={type: 'own.py:Own', shift: 2}"])


def test_progressive_has_times_between_the_levels_of_a_dynamic_shift_but_not_of_a_conversion(tmp_path: Path) -> None:
    own = own_schedule(ModelConfig(path=str(shapes_with(tmp_path / "dynamic", DYNAMIC))))
    halved = build_algorithm({"type": "progressive", "num_steps": 4}, own)
    assert isinstance(halved, Progressive)
    found = halved.times()
    doubled = own.levels(8, grid="paper")
    torch.testing.assert_close(torch.stack(found), torch.stack([doubled[:-2:2], doubled[1::2], doubled[2::2]]))
    karras = own_schedule(ModelConfig(path=str(shapes_with(tmp_path / "karras", {"use_karras_sigmas": True}))))
    with pytest.raises(ValueError, match="grid: pipeline has no times between its levels"):
        build_algorithm({"type": "progressive", "grid": "pipeline"}, karras).check_schedule()


def test_the_density_of_pretraining_takes_the_resolution_s_shift(tmp_path: Path) -> None:
    model = shapes_with(tmp_path / "model", {"shift": 3.0})
    for value, expected in ((1.5, 1.5), ("auto", 3.0 * 0.5), (None, 3.0)):
        own = own_schedule(ModelConfig(path=str(model), height=32, width=32))
        flow = build_algorithm({"type": "rectified_flow", "shift": value}, own)
        assert isinstance(flow, RectifiedFlow) and flow._shift == pytest.approx(expected)


def test_what_a_run_resolves_is_written_as_it_was_meant(tmp_path: Path) -> None:
    config = load_align(write_config(tmp_path), ["algorithm.shift=auto"]).config
    written = yaml.safe_load(write_resolved(config, tmp_path / "run").read_text())
    assert written["algorithm"]["shift"] == "auto" and written["algorithm"]["grid"] == "pipeline"
    assert written["evaluation"]["grid"] == "pipeline"
    again = load_align(tmp_path / "run" / RESOLVED).config
    refuse_changes(config, again, tmp_path / "run")
