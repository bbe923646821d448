"""Guidance, negative prompts and sizes that a run walks otherwise than its user meant are said at the start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flowalign.intake.file import load_align
from tests.families.tiny import tiny_pipeline

CONFIG = """
name: r
iterations: 2
model: {path: model}
algorithm: {type: flow_grpo, num_steps: 4, guidance_scale: 3.5}
data: {prompts: prompts.jsonl}
rewards: [jpeg]
evaluation: {prompts: prompts.jsonl, scorer: jpeg, guidance_scale: 3.5}
checkpoint: {keep_best: 0}
"""
LED = "model.negative_prompt: nothing leads away from it, since no {0} is above 1; set algorithm.{0}, or leave this out"
DEFAULT = (
    "evaluation.{0}: 1, the default, while algorithm.{0} is {1}; evaluations, `sample` and `evaluate` take that of "
    "evaluation"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("walks")
    for family in ("flux-dev", "z_image-turbo"):
        tiny_pipeline(family, here / family)
    (here / "prompts.jsonl").write_text(json.dumps({"prompt": "a cat"}) + "\n")
    (here / "run.yaml").write_text(CONFIG)
    return here


@pytest.mark.parametrize(
    ("model", "overrides", "said"),
    [
        ("flux-dev", [], []),
        (
            "flux-dev",
            ["evaluation={guidance_scale: 1, every: 0}", "algorithm.guidance_scale=1"],
            [
                "algorithm.guidance_scale: 1; the network takes it as an input, where 1 is a number like any other and "
                "not none (docs/models.md names the usual one)"
            ],
        ),
        ("flux-dev", ["model.negative_prompt=ugly"], [LED.format("true_guidance_scale")]),
        ("flux-dev", ["model.negative_prompt=ugly", "evaluation.true_guidance_scale=2"], []),
        (
            "flux-dev",
            ["model.negative_prompt=ugly", "algorithm.true_guidance_scale=2"],
            [DEFAULT.format("true_guidance_scale", 2)],
        ),
        ("z_image-turbo", ["model.negative_prompt=ugly"], []),
        (
            "z_image-turbo",
            ["model.negative_prompt=ugly", "algorithm.guidance_scale=1", "evaluation.guidance_scale=1"],
            [LED.format("guidance_scale")],
        ),
        (
            "z_image-turbo",
            [
                "model.negative_prompt=ugly",
                "algorithm={guidance_scale: 1, update_guidance_scale: 2}",
                "evaluation.guidance_scale=1",
            ],
            [],
        ),
        ("flux-dev", ["data.sizes=[64x64, 64x96]", "model={height: 64, width: 96}"], []),
        ("flux-dev", ["data.sizes=[64x64, 64x96]", "evaluation.every=0"], []),
        ("flux-dev", ["data.groups_per_iteration=3", "algorithm.group_size=16"], []),
        (
            "flux-dev",
            ["data.groups_per_iteration=2", "algorithm.group_size=4"],
            [
                "rollout.chunk_size: 48, and an iteration makes 8 images; a chunk is filled up and takes the time and "
                "the memory of 48"
            ],
        ),
        (
            "flux-dev",
            ["data.sizes=[64x64, 64x96]", "model={height: 96, width: 64}"],
            [
                "data.sizes: evaluations make images of 96x64, that of model, which is none of these; set model.height "
                "and model.width"
            ],
        ),
    ],
)
def test_what_is_walked_otherwise_is_said(model: str, overrides: list[str], said: list[str], folder: Path) -> None:
    given = [f"model.path={folder / model}", *overrides]
    assert list(load_align(folder / "run.yaml", given).notes) == said


def test_evaluations_guided_by_their_default_are_said(folder: Path) -> None:
    (folder / "unset.yaml").write_text(CONFIG.replace("jpeg, guidance_scale: 3.5", "jpeg"))
    notes = load_align(folder / "unset.yaml", [f"model.path={folder / 'flux-dev'}"]).notes
    assert list(notes) == [DEFAULT.format("guidance_scale", 3.5)]
