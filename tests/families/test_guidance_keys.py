"""The keys of guidance: what they ask of a walk, what a plan counts for them, and where they are refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from flowalign.algorithms import build_algorithm
from flowalign.algorithms.parts.teachers import taught_velocity
from flowalign.cli import app
from flowalign.cli.sampling import Sampling
from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.config.sections import SamplingConfig
from flowalign.export.card import write_card
from flowalign.flow.schedule import PipelineSchedule
from flowalign.intake.file import load_align
from flowalign.models.families import flux
from flowalign.plan.geometry import plan_geometry
from flowalign.samples.opened import sampling_plan
from flowalign.types import Guidance
from tests.conditions import text_condition
from tests.families.ours import LENGTH, flowalign, write_run
from tests.families.public import apart, public_latents
from tests.tiny import run_config

KEYS = {"guidance_scale": 3.5, "true_guidance_scale": 2.0, "guidance_norm_cap": 1.5, "guidance_until": 0.8}
GUIDANCE = Guidance(3.5, False, 2.0, 1.5, 0.8)
Build = Callable[..., Path]


def test_rollouts_evaluations_and_teachers_are_guided_as_their_keys_say() -> None:
    assert sampling_plan(SamplingConfig.model_validate(KEYS), schedule=PipelineSchedule()).guidance == GUIDANCE
    plan = build_algorithm({"type": "nft", **KEYS}).plan(0, 0)
    assert plan is not None and plan.guidance == GUIDANCE
    opd = build_algorithm({"type": "opd", "teachers": {"a": {"path": "a", **KEYS}}})
    seen: list[Guidance] = []

    def teacher(x: Any, t: Any, condition: Any, **options: Any) -> Any:
        seen.append(options["guidance"])
        return x

    one = torch.zeros(1, 1, 1)
    item = {"x": torch.zeros(1, 4, 2, 2), "sigma": torch.zeros(1), "teacher": torch.zeros(1, dtype=torch.long)}
    condition = text_condition(one, one[:, 0], torch.zeros(1, dtype=torch.long), one[0], one[0, 0])
    taught_velocity({"teacher:a": teacher}, opd.config.teachers, item, condition)
    assert seen == [GUIDANCE]


@pytest.mark.parametrize(
    ("model", "keys", "passes"),
    [
        ("FLUX.1-dev", {"guidance_scale": 3.5}, 1),
        ("FLUX.1-dev", {"guidance_scale": 3.5, "true_guidance_scale": 2.0}, 2),
        ("FLUX.1-schnell", {"guidance_scale": 3.5}, 2),
        ("FLUX.1-schnell", {"guidance_scale": 1.0}, 1),
    ],
)
def test_a_plan_counts_a_second_pass_where_there_is_one(model: str, keys: dict[str, float], passes: int) -> None:
    """Two images of 10 steps in rollout and update, 3 of 4 steps in an evaluation."""
    config = AlignConfig.model_validate(
        {
            "name": "x",
            "iterations": 1,
            "model": {"path": model},
            "data": {"groups_per_iteration": 1},
            "algorithm": {"type": "flow_grpo", "group_size": 2, "num_steps": 10, **keys},
            "rewards": ["clip"],
            "learner": {"micro_batch_size": 10},
            "evaluation": {"every": 1, "num_samples": 3, "num_steps": 4, **keys},
        }
    )
    made = plan_geometry(config, build_algorithm(config.algorithm))
    assert (made.rollout_passes, made.learner_backward_passes) == (20 * passes, 20 * passes)
    assert made.evaluation_passes == 12 * passes


REFUSED: dict[str, tuple[str, list[str], str]] = {
    "no input": (
        "sd3",
        ["algorithm.true_guidance_scale=2"],
        "algorithm.true_guidance_scale: the network",
    ),
    "no input in an evaluation": (
        "flux-schnell",
        ["evaluation.true_guidance_scale=2"],
        "evaluation.true_guidance_scale",
    ),
    "no two passes": (
        "flux-dev",
        ["algorithm.guidance_norm_cap=1"],
        "algorithm.guidance_norm_cap: true_guid",
    ),
    "no guidance": ("z_image", ["evaluation.guidance_until=0.5"], "evaluation.guidance_until: guidance_scale is 1, so"),
    "two rules of length": (
        "sd3",
        ["algorithm.guidance_norm_cap=1", "algorithm.guidance_scale=3", "algorithm.norm_preserving=true"],
        "algorithm.guidance_norm_cap: norm_preserving keeps",
    ),
    "no negative prompt": (
        "flux-dev",
        ["algorithm.true_guidance_scale=2"],
        "algorithm.true_guidance_scale: 2 guides nothing: FLUX.1 is guided away from a negative prompt alone",
    ),
    "no negative prompt of two passes": (
        "flux-schnell",
        ["evaluation.guidance_scale=2", "evaluation.every=1"],
        "evaluation.guidance_scale: 2 guides nothing",
    ),
    "a number that is none": ("flux-dev", ["algorithm.true_guidance_scale=-1"], "algorithm.true_guidance_scale"),
    "another name": ("flux-dev", ["algorithm.true_cfg_scale=3"], "did you mean algorithm.true_guidance_scale"),
}


# Each command that samples from a model, with what else it needs; {} is the test's folder.
SAMPLING: dict[str, list[str]] = {
    "sample": ["--prompt", "a", "--out", "{}/out"],
    "evaluate": ["--out", "{}/out"],
    "make-pairs": ["--to", "{}/out"],
    "make-preferences": ["--reward", "{}/brightness.py:reward", "--out", "{}/out"],
    "calibrate-cache": ["--to", "{}/out"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_model_has_no_use_for_is_refused_by_its_key(tiny: Build, tmp_path: Path, case: str) -> None:
    family, changes, said = REFUSED[case]
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_align(write_run(tmp_path, tiny(family)), changes)


def test_a_teacher_s_own_network_decides(tiny: Build, tmp_path: Path) -> None:
    path = write_run(tmp_path, tiny("flux-dev"))

    def teachers(name: str) -> list[str]:
        one = f"{{path: {tiny(name)}, true_guidance_scale: 2}}"
        return [
            "model.negative_prompt=blurry",
            f"algorithm={{type: opd, num_steps: 2, teachers: {{a: {one}}}}}",
            "rewards=[]",
        ]

    load_align(path, teachers("flux-dev"))
    with pytest.raises(ConfigError, match=r"^algorithm\.teachers\.a\.true_guidance_scale: the network of this FLUX\.1"):
        load_align(path, teachers("flux-schnell"))


def test_a_teacher_is_led_away_from_what_its_own_pipeline_takes(tiny: Build, tmp_path: Path) -> None:
    """Schnell's guidance is two passes, which need a negative prompt; dev's is an input, and needs none."""

    def teaches(student: str, teacher: str, *changes: str) -> None:
        one = f"{{path: {tiny(teacher)}, guidance_scale: 2}}"
        opd = [f"algorithm={{type: opd, num_steps: 2, teachers: {{a: {one}}}}}", "rewards=[]"]
        load_align(write_run(tmp_path, tiny(student)), [*opd, *changes])

    teaches("flux-schnell", "flux-dev")
    with pytest.raises(ConfigError, match=r"^algorithm\.teachers\.a\.guidance_scale: 2 guides nothing: FLUX\.1"):
        teaches("flux-dev", "flux-schnell")
    teaches("flux-dev", "flux-schnell", "model.negative_prompt=blurry")


def test_the_commands_take_the_same_keys(tiny: Build, public: Any, tmp_path: Path) -> None:
    """A sample with true guidance has the latents of the public pipeline's second pass from the empty text."""
    directory, out = tiny("flux-dev"), tmp_path / "out"
    path = write_run(tmp_path, directory)
    asked = [
        "--num-steps",
        "3",
        "--guidance-scale",
        "3.5",
        "--true-guidance-scale",
        "2",
        "--seed",
        "5",
        "--save-latents",
    ]
    asked += ["--negative-prompt", ""]
    said = flowalign("sample", directory, "--prompt", "a red cube", *asked, "--config", path, "--out", out)
    assert "guidance 3.5, true guidance 2" in " ".join(said.split())
    made = load_file(out / "latents.safetensors")
    call: dict[str, Any] = {"num_steps": 3, "guidance": 3.5, "true_guidance": 2.0, "negative": "", "size": (64, 64)}
    theirs = public_latents(public("flux-dev"), ["a red cube"], noise=made["noise"], max_sequence_length=LENGTH, **call)
    assert apart(made["latents"], theirs) <= 1e-5
    refused = CliRunner().invoke(
        app, ["sample", str(tiny("sd3")), "--prompt", "a", "--true-guidance-scale", "2", "--out", str(tmp_path / "no")]
    )
    assert refused.exit_code == 2 and "--true-guidance-scale: the network of this" in " ".join(refused.output.split())
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("command", SAMPLING)
def test_every_command_that_samples_has_the_same_options(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    assert all(f"--{name.replace('_', '-')} " in shown for name in Sampling.__dataclass_fields__)


@pytest.mark.parametrize("command", SAMPLING)
@pytest.mark.parametrize(
    ("model", "option"), [("flux-schnell", "--guidance-scale"), ("flux-dev", "--true-guidance-scale")]
)
def test_guidance_that_guides_nothing_is_refused_by_every_command(
    tiny: Build, tmp_path: Path, command: str, model: str, option: str
) -> None:
    """The public pipeline would make one pass, and we two."""
    write_run(tmp_path, tiny(model))
    words = [word.format(tmp_path) for word in SAMPLING[command]]
    asked = [command, str(tiny(model)), *words, option, "4", "--config", str(tmp_path / "run.yaml")]
    done = CliRunner().invoke(app, asked)
    said = " ".join(done.output.split())
    assert done.exit_code == 2 and f"{option}: 4 guides nothing: FLUX.1 is guided away from a" in said
    assert 'give --negative-prompt, such as " "' in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("flux-dev", {"guidance_scale": 3.5}, "guidance_scale=3.5, max"),
        ("flux-dev", KEYS, 'guidance_scale=3.5, true_cfg_scale=2, negative_prompt="", max'),
        ("flux-schnell", {"guidance_scale": 2.0}, 'true_cfg_scale=2, negative_prompt="", max'),
        ("flux-schnell", {"guidance_scale": 1.0}, "num_inference_steps=4, max"),
        ("z_image", KEYS, "guidance_scale=2.5, cfg_normalization=1.5, cfg_truncation=0.8, max"),
    ],
)
def test_a_card_says_what_the_pipeline_is_called_with(
    tiny: Build, tmp_path: Path, name: str, keys: dict[str, float], said: str
) -> None:
    config = run_config(tiny(name), evaluation={"num_samples": 4, "num_steps": 4, **keys})
    write_card(tmp_path, config, {"iteration": 1}, kind="pipeline", run_dir=tmp_path)
    assert said in (tmp_path / "README.md").read_text()


def test_a_card_calls_for_pictures_of_a_size_that_was_learned_and_names_no_folder_of_this_machine(
    tiny: Build, tmp_path: Path
) -> None:
    (tmp_path / "own.jsonl").write_text("")
    own = {"prompts": str(tmp_path / "own.jsonl"), "sizes": ["64x96", "96x64"]}
    config = run_config(tiny("flux-dev"), data=own)
    write_card(tmp_path, config, {"iteration": 1}, kind="pipeline", run_dir=tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert ", height=64, width=96)" in card and "| Sizes | 64x96, 96x64 |" in card
    assert "| Prompts | `own.jsonl`, " in card and str(tmp_path) not in card


def test_a_call_of_a_network_that_takes_no_number_has_none() -> None:
    assert flux.guidance_call({"guidance_embeds": False}, Guidance(1.0)) == {}
