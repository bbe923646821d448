"""A run whose configuration says what hardly was meant: it says so, and goes on to its end."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from flowalign.config.alignment import AlignConfig
from flowalign.measure.evaluate import best_metric, evaluate_checkpoint
from flowalign.record.checkpoint import load
from flowalign.record.metrics import read_metrics
from flowalign.run.drive import drive
from flowalign.run.sync import SyncError, SyncGuard, has_learned
from flowalign.run.workers import BindReceipt
from flowalign.samples.sampled import sampled_model
from flowalign.types import Update
from tests.cluster.runs import small_config

GOLD = {"spec": "own.py:bright", "tasks": ["colors", "counting"]}


@pytest.fixture(scope="module")
def config(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> AlignConfig:
    folder = tmp_path_factory.mktemp("notes")
    (folder / "own.py").write_text("def bright(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    return small_config(
        tiny_pipeline_dir,
        folder,
        cluster={"backend": "local"},
        runs_dir=str(folder / "runs"),
        iterations=3,
        data={"groups_per_iteration": 2},
        rewards=[{"spec": "jpeg"}],
        learner={"engine": "torch", "micro_batch_size": 4, "optimizer": {"decay_steps": 1}},
        evaluation={"every": 2, "num_samples": 12, "num_steps": 2, "gold": [GOLD]},
        checkpoint={"every": 1, "keep_last": 9, "best_metric": "eval/genevall/overall"},
        logging={"wandb": "disabled"},
    )


@pytest.fixture(scope="module")
def said(config: AlignConfig) -> str:
    console = Console(file=io.StringIO(), width=400)
    drive(config, Path(config.runs_dir).parent, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_learning_rate_of_nothing_changes_nothing_and_ends_no_run(config: AlignConfig, said: str) -> None:
    root = Path(config.runs_dir) / config.name / "checkpoints"
    first, last = (load(root / f"step_{step:06d}").model for step in (1, 3))
    assert all(torch.equal(first[name], last[name]) for name in first)
    rates = [row["learning_rate"] for row in read_metrics(root.parent / "metrics.jsonl") if "learning_rate" in row]
    assert rates == [1e-4, 0, 0]


def test_a_best_metric_that_no_evaluation_measures_is_said_once_with_the_nearest(said: str) -> None:
    sentence = "checkpoint.best_metric: eval/genevall/overall is not measured, so no best checkpoint is kept"
    assert said.count(sentence) == 1 and f"{sentence}; did you mean eval/geneval/overall?" in said


def test_the_overall_of_a_scorer_for_some_tasks_is_that_of_its_tasks(config: AlignConfig, said: str) -> None:
    run_dir = Path(config.runs_dir) / config.name
    first = next(row for row in read_metrics(run_dir / "metrics.jsonl") if row["iteration"] == 2)
    later = evaluate_checkpoint(
        sampled_model(run_dir / "checkpoints" / "step_000002", config), base_dir=Path(config.runs_dir).parent
    ).metrics
    for row in (first, later):
        own = {key: value for key, value in row.items() if key.startswith("eval/bright/")}
        assert set(own) == {"eval/bright/overall", "eval/bright/colors", "eval/bright/counting"}
        assert own.pop("eval/bright/overall") == pytest.approx(sum(own.values()) / 2)
    assert first["eval/bright/overall"] == pytest.approx(later["eval/bright/overall"])
    assert math.isfinite(first["standard_error/bright/overall"]) and "eval/geneval/position" in first


def test_a_scorer_that_no_sample_is_for_has_no_overall_and_ends_nothing(config: AlignConfig) -> None:
    gold = config.evaluation.gold[0].model_copy(update={"tasks": ["another"]})
    few = config.evaluation.model_copy(update={"gold": [gold], "num_samples": 3, "num_steps": 1})
    found = evaluate_checkpoint(
        sampled_model(Path(config.model.path), config.model_copy(update={"evaluation": few})),
        base_dir=Path(config.runs_dir).parent,
    )
    assert math.isnan(found.metrics["eval/bright/overall"]) and math.isnan(
        found.standard_errors["standard_error/bright/overall"]
    )


def test_the_default_best_metric_is_the_overall_of_what_judges_the_evaluation(config: AlignConfig) -> None:
    def metric(scorer: dict | None, **checkpoint: str) -> str:
        changed = {"evaluation": {"scorer": scorer}, "checkpoint": checkpoint}
        return best_metric(AlignConfig.model_validate({**config.model_dump(), **changed}))

    assert metric(None) == "eval/geneval/overall"
    assert metric({"spec": "pickscore"}) == "eval/pickscore/overall"
    assert metric({"spec": "pickscore"}, best_metric="reward/total/mean") == "reward/total/mean"


def test_an_update_that_was_lost_still_ends_a_run() -> None:
    guard = SyncGuard()
    for version in (1, 2):
        sent = BindReceipt("learner", version, 1, "same")
        if version == 2:
            with pytest.raises(SyncError, match="version 2 has the same weights as version 1: the update was lost, or"):
                guard.check_receipts(sent, [sent])
        else:
            guard.check_receipts(sent, [sent])


def test_images_that_score_alike_end_no_run_that_has_a_kl(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "alike.py").write_text("def alike(images, prompts, metadata):\n    return [0.0] * len(images)\n")
    config = small_config(
        tiny_pipeline_dir,
        tmp_path,
        cluster={"backend": "local"},
        runs_dir=str(tmp_path / "runs"),
        iterations=2,
        data={"groups_per_iteration": 1},
        rewards=[{"spec": "alike.py:alike"}],
        algorithm={"type": "flow_grpo", "group_size": 2, "num_steps": 2, "beta": 0.1},
        learner={"engine": "torch", "micro_batch_size": 4},
        evaluation={"every": 0},
        logging={"wandb": "disabled"},
    )
    drive(config, tmp_path, Console(file=io.StringIO()))
    rows = read_metrics(tmp_path / "runs" / config.name / "metrics.jsonl")
    assert [(row["advantage/mean_abs"], row["grad_norm"], row["loss/kl"]) for row in rows] == [(0, 0, 0)] * 2


def test_an_update_without_a_gradient_is_lost_where_images_have_advantages() -> None:
    def learned(**metrics: float) -> bool:
        return has_learned(Update(1, {"learner/updates": 1, "learning_rate": 1e-4, **metrics}))

    assert learned(grad_norm=0.0, **{"advantage/mean_abs": 0.1}) and learned(grad_norm=0.0)
    assert learned(grad_norm=0.1, **{"advantage/mean_abs": 0.0})
    assert not learned(grad_norm=0.0, **{"advantage/mean_abs": 0.0})


def test_a_run_on_ray_that_is_not_handed_its_backend_is_refused_and_starts_none(
    tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    config = small_config(tiny_pipeline_dir, tmp_path, cluster={"backend": "ray"}, runs_dir=str(tmp_path / "runs"))
    with pytest.raises(ValueError, match=r"cluster\.backend: ray needs flowalign\.cluster\.ray_backend\.RayBackend"):
        drive(config, tmp_path, Console(file=io.StringIO()))
    assert not (tmp_path / "runs" / config.name / "config.yaml").exists()
