"""Scores that are trained on and never come are said once, by name: they are no failure, so nothing else says it."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console

from flowalign.intake.file import load_align
from flowalign.record.metrics import read_metrics
from flowalign.run.drive import drive
from flowalign.safety.silent import SilentScores
from tests.safety.test_collapse_runs import write_run

NAN = math.nan
# A part that nothing ever has, and one that every second prompt has.
REWARD = """
def mine(images, prompts, metadata):
    count = len(images)
    seldom = [1.0 if prompt == "b" else float("nan") for prompt in prompts]
    return {"mine": images.mean((1, 2, 3)), "never": [float("nan")] * count, "seldom": seldom}
"""
SAID = (
    "never is trained on, and was NaN on every image so far, so that its weight does nothing; see why its reward "
    "answers none, or leave it out"
)


def row(**means: float | None) -> dict[str, Any]:
    return {f"reward/{name}/mean": value for name, value in {"total": 1.0, **means}.items()}


def test_a_score_is_named_once_at_the_end_of_the_block_unless_it_was_a_number_before() -> None:
    silent, names = SilentScores(3), ("a", "b", "c")
    assert silent.update(row(a=1.0, b=NAN, c=NAN), names) == []
    assert silent.update({"time/x": 1.0}, names) == []  # of an iteration that scored nothing
    assert silent.update(row(a=NAN, b=NAN, c=2.0), names) == []
    assert silent.update(row(a=NAN, b=NAN, c=NAN), names) == ["b"]
    assert silent.update(row(a=NAN, b=NAN, c=NAN), names) == []


def test_a_resumed_run_goes_on_from_its_rows_in_which_nan_is_null() -> None:
    rows = [row(a=1.0, b=None), row(a=None, b=None)]
    assert SilentScores(3, rows).update(row(a=NAN, b=NAN), "ab") == ["b"]
    assert SilentScores(3, [*rows, row()]).update(row(a=NAN, b=NAN), "ab") == []


def run(folder: Path, pipeline: Path, reward: dict[str, Any], *overrides: str) -> list[str]:
    """What a run says of its iterations."""
    file = write_run(folder, pipeline, "silent", iterations=4, rewards=[reward], safety={"window": 3})
    (folder / "reward.py").write_text(REWARD)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in "ab"))
    loaded = load_align(file, ["data.prompts=prompts.jsonl", "learner.optimizer.learning_rate=1e-5", *overrides])
    said = io.StringIO()
    drive(loaded.config, loaded.base_dir, Console(file=said, width=400))
    return [line for line in said.getvalue().splitlines() if "warning" in line]


def test_a_run_says_once_which_part_never_came_and_changes_no_number(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    parts = {"spec": "reward.py:mine", "parts": {"never": 2.0, "seldom": 1.0}}
    assert run(tmp_path / "with", tiny_pipeline_dir, parts, "iterations=3") == [f"warning at iteration 3: {SAID}"]
    assert run(tmp_path / "with", tiny_pipeline_dir, parts) == []  # the same run goes on
    without = {"spec": "reward.py:mine", "parts": {"seldom": 1.0}}
    assert run(tmp_path / "without", tiny_pipeline_dir, without) == []
    totals = [
        [row["reward/total/mean"] for row in read_metrics(tmp_path / name / "runs" / "silent" / "metrics.jsonl")]
        for name in ("with", "without")
    ]
    assert totals[0] == totals[1]


def test_a_run_that_is_shorter_than_a_block_says_it_at_its_end(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    parts = {"spec": "reward.py:mine", "parts": {"never": 2.0}}
    assert run(tmp_path, tiny_pipeline_dir, parts, "iterations=2") == [f"warning at iteration 2: {SAID}"]


def test_images_that_nothing_trained_on_applies_to_are_said_once_with_its_names(
    tmp_path: Path, tiny_pipeline_dir: Path
) -> None:
    parts = {"spec": "reward.py:mine", "weight": 0, "parts": {"seldom": 1.0}}
    said = [line for line in run(tmp_path, tiny_pipeline_dir, parts) if "alarm/" not in line]
    assert said == [
        "warning at iteration 1: nothing that is trained on applies to 4 of 8 images (seldom); they have no total "
        "reward"
    ]
