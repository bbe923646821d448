"""Runs with a curriculum: a stop, a lost learner and another order of events change no bit, and without it nothing is
there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from flowalign.cluster.ray_backend import RayBackend
from flowalign.config.alignment import AlignConfig
from flowalign.config.run import RunConfig
from flowalign.config.section import ConfigError
from flowalign.intake.changes import resume_differences
from flowalign.record import checkpoint
from flowalign.record.metrics import read_metrics, without_times
from flowalign.run.drive import Say, drive
from flowalign.run.local import LocalBackend
from flowalign.run.ranks import Rank
from flowalign.run.restarts import RankLost
from flowalign.run.workers import LearnerWorker
from flowalign.types import Scores, Trajectories, Update
from tests.fault.victim import content
from tests.tiny import merged

# Of each picture its brightness, and whether it is even: half of all pass, and another share of each prompt's.
REWARD = """
def reward(images, prompts, metadata):
    pixels = images.reshape(len(images), -1).astype(int)
    return {"reward": pixels.mean(1) / 255, "even": 1 - pixels.sum(1) % 2}
"""
CURRICULUM = {"score": "even"}


def configured(folder: Path, pipeline: Path, name: str, **changes: Any) -> AlignConfig:
    algorithm = {"type": "flow_grpo", "group_size": 3, "num_steps": 3, "window": {"kind": "random", "size": 1}}
    own = content(name, folder, pipeline, algorithm=algorithm, iterations=8)
    own["data"] = {"groups_per_iteration": 4, "curriculum": CURRICULUM}
    (folder / "bright.py").write_text(REWARD)
    return AlignConfig.model_validate(merged(own, changes))


def run(config: AlignConfig, backend: type[LocalBackend] = LocalBackend) -> Path:
    def make(config: RunConfig, base_dir: Path, say: Say, made: object, rank: Rank) -> LocalBackend:
        return backend(config, base_dir, say, rank)

    return drive(config, Path(config.runs_dir).parent, Console(quiet=True), backend=make)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline_dir: Path) -> Path:
    return run(configured(tmp_path_factory.mktemp("whole"), tiny_pipeline_dir, "whole"))


def state(run_dir: Path, step: int) -> dict[str, Any]:
    return json.loads((run_dir / "checkpoints" / f"step_{step:06d}" / "state.json").read_text())


def assert_same(one: Path, other: Path) -> None:
    """Weights, moments, average, ratings and all rows are the same to the bit."""
    a, b = (checkpoint.load(run_dir / "checkpoints" / "step_000008") for run_dir in (one, other))
    assert a.ema is not None and b.ema is not None
    for left, right in ((a.model, b.model), (a.ema, b.ema), (a.optimizer_of(0)[0], b.optimizer_of(0)[0])):
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    assert a.state["curriculum"] == b.state["curriculum"]
    rows = [[without_times(row) for row in read_metrics(run_dir / "metrics.jsonl")] for run_dir in (one, other)]
    assert rows[0] == rows[1] and [row["iteration"] for row in rows[0]] == list(range(1, 9))


def test_what_was_passed_changes_what_is_drawn_and_is_in_metrics_and_checkpoints(whole: Path) -> None:
    rows = read_metrics(whole / "metrics.jsonl")
    tasks = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    for row in rows:
        assert 0 <= row["curriculum/pass_rate"] <= 1
        assert sum(row[f"curriculum/{task}/share"] for task in tasks) == pytest.approx(1)
    assert len({row["curriculum/counting/share"] for row in rows}) > 4
    ratings = state(whole, 8)["curriculum"]
    assert list(ratings) == list(tasks) and any(own["prompts"] for own in ratings.values())
    assert all(own["rating"] == 0 or own["prompts"] for own in ratings.values())


def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path: Path, tiny_pipeline_dir: Path, whole: Path) -> None:
    for iterations in (2, 5, 8):
        run_dir = run(configured(tmp_path, tiny_pipeline_dir, "stopped", iterations=iterations))
    assert_same(whole, run_dir)


class Losing(LocalBackend):
    """A backend whose learner is lost after some iterations were collected and before they were learned from."""

    lost: list[int]

    def update(self, trajectories: Sequence[Trajectories] | None, scores: Scores | None, iteration: int) -> Update:
        if iteration in self.lost:
            self.lost.remove(iteration)
            raise RankLost("the learner is lost", f"at {iteration}")
        return super().update(trajectories, scores, iteration)

    def restart_learner(self) -> None:
        self.learner.close()
        self.learner = LearnerWorker(self.config)


def test_a_run_whose_learner_is_lost_forgets_what_it_will_do_again(
    tmp_path: Path, tiny_pipeline_dir: Path, whole: Path
) -> None:
    backend = type("Losing", (Losing,), {"lost": [1, 5]})  # before the first checkpoint, after the third iteration, and
    config = configured(tmp_path, tiny_pipeline_dir, "lost", cluster={"restart_wait_s": 0.01})
    run_dir = run(config, backend)
    assert backend.lost == []
    assert_same(whole, run_dir)


@pytest.mark.slow
def test_ray_with_two_rollout_workers_makes_the_same_bits(tmp_path: Path, tiny_pipeline_dir: Path, whole: Path) -> None:
    cluster = {"backend": "ray", "rollout_workers": 2, "rollout_cpus": 0.5, "reward_cpus": 0.25, "learner_cpus": 0.25}
    config = configured(tmp_path, tiny_pipeline_dir, "ray", cluster=cluster)
    assert_same(whole, drive(config, tmp_path, Console(quiet=True), backend=RayBackend))


def test_without_a_curriculum_neither_metrics_nor_checkpoints_know_of_one(
    tmp_path: Path, tiny_pipeline_dir: Path
) -> None:
    run_dir = run(configured(tmp_path, tiny_pipeline_dir, "plain", iterations=2, data={"curriculum": None}))
    assert not [key for row in read_metrics(run_dir / "metrics.jsonl") for key in row if "curriculum" in key]
    assert "curriculum" not in state(run_dir, 2)


def test_a_run_that_was_begun_without_cannot_go_on_with_one(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    with_one = configured(tmp_path, tiny_pipeline_dir, "same")
    without = configured(tmp_path, tiny_pipeline_dir, "same", data={"curriculum": None})
    assert resume_differences(with_one, with_one) == []
    assert all(key.startswith("data.curriculum") for key in resume_differences(without, with_one))
    assert "data.curriculum.score" in resume_differences(without, with_one)


def test_a_score_that_no_reward_answers_ends_the_run_before_it_has_learned(
    tmp_path: Path, tiny_pipeline_dir: Path
) -> None:
    config = configured(tmp_path, tiny_pipeline_dir, "wrong", data={"curriculum": {"score": "evn"}})
    with pytest.raises(ConfigError, match=r"data\.curriculum\.score: no reward answers 'evn'; did you mean even\?"):
        run(config)
    assert not list((tmp_path / "runs" / "wrong").glob("checkpoints/step_*"))
