"""What a training run on latents leaves beside its weights: evaluations, rows at intervals, wandb, the best one."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.record import checkpoint
from flowalign.record.metrics import read_metrics
from tests.fault.trainings import bank_of, here, written


@pytest.fixture(scope="module")
def bank(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bank_of(tiny_pipeline_dir, tmp_path_factory.mktemp("bank"))


def test_rows_come_at_intervals_and_with_what_is_measured_and_wandb_has_them(
    tiny_pipeline_dir: Path, bank: Path, tmp_path: Path
) -> None:
    logged = {"every": 5, "wandb": "offline"}
    config = written(tmp_path, tiny_pipeline_dir, bank, logging=logged)
    said, run_dir = here(config), tmp_path / "runs" / "base"
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [0, 3, 4, 5, 6, 8, 9, 10, 12]  # of evaluations and validations as well
    assert [row["iteration"] for row in rows if "eval/reward/overall" in row] == [0, 4, 8, 12]
    assert [row["iteration"] for row in rows if "validation_ema/loss" in row] == [3, 6, 9, 12]
    assert re.findall(r"iteration (\d+)/12", said) == [str(row["iteration"]) for row in rows[1:]]
    assert sorted(os.listdir(run_dir / "samples")) == [f"iteration_{step:06d}" for step in (0, 4, 8, 12)]
    assert list(run_dir.glob("wandb/offline-run-*/*.wandb"))
    for what, times in (("evaluation", [0, 4, 8, 12]), ("validation", [3, 6, 9, 12])):
        assert [int(at) for at in re.findall(rf"{what} at iteration (\d+) begins", said)] == times
        assert [row["iteration"] for row in rows if row.get(f"time/{what}_s", 0) > 0] == times
    of_all = {"time/iteration_s", "time/learn_s"}  # nothing is rolled out but for evaluations
    measured = {"time/evaluation_s", "time/validation_s"}
    assert all({key for key in row if key.startswith("time/")} - measured == of_all for row in rows[1:])
    assert re.search(r"validation \d\.\d+ \(average \d\.\d+, \d\.\d s\)", said)


def test_an_evaluation_that_nobody_judges_says_where_its_images_lie(
    tiny_pipeline_dir: Path, bank: Path, tmp_path: Path
) -> None:
    evaluation = {"every": 12, "scorer": None}
    said = here(written(tmp_path, tiny_pipeline_dir, bank, evaluation=evaluation))
    lies = tmp_path / "runs" / "base" / "samples" / "iteration_000012"
    assert (
        f"evaluation at iteration 12: 5 samples of 5 prompts, seed 1234, in {lies}; " in said
        and len(list(lies.iterdir())) == 6
    )


def test_the_best_checkpoint_of_a_loss_is_that_of_its_lowest_value(
    tiny_pipeline_dir: Path, bank: Path, tmp_path: Path
) -> None:
    kept = {"keep_last": 1, "keep_best": 1, "best_metric": "validation/loss", "every": 2}
    validation = {"latents": str(bank), "every": 4, "num_samples": 6, "num_times": 3}
    phase = {"max_sequence_lengths": {16: 1.0}}
    phases = [{"iterations": 8, "learning_rate": 1e-3, **phase}, {"iterations": 4, "learning_rate": 1.0, **phase}]
    changes = {"checkpoint": kept, "validation": validation, "evaluation": {"every": 0}}
    said = here(written(tmp_path, tiny_pipeline_dir, bank, phases=phases, **changes))
    losses = {
        row["iteration"]: row["validation/loss"]
        for row in read_metrics(tmp_path / "runs" / "base" / "metrics.jsonl")
        if "validation/loss" in row
    }
    best = min(losses, key=lambda step: losses[step])
    assert best == 8 and checkpoint.steps(tmp_path / "runs" / "base" / "checkpoints") == [best, 12]
    assert "is not measured" not in said  # though the first checkpoint comes before the first validation


def test_flowalign_evaluate_measures_what_the_run_has(tiny_pipeline_dir: Path, bank: Path, tmp_path: Path) -> None:
    evaluation = {"every": 12, "prompts": "shapes:eval"}
    here(written(tmp_path, tiny_pipeline_dir, bank, evaluation=evaluation))
    run_dir, out = tmp_path / "runs" / "base", tmp_path / "out"
    measured = {}
    for weights in ("ema", "model", "policy"):
        ended = CliRunner().invoke(app, ["evaluate", str(run_dir), "--weights", weights, "--out", str(out / weights)])
        assert ended.exit_code == 0, ended.output
        measured[weights] = json.loads((out / weights / "metrics.json").read_text())["metrics"]
    row = read_metrics(run_dir / "metrics.jsonl")[-1]
    assert measured["ema"].items() <= row.items()
    assert measured["policy"] == measured["model"]
    assert measured["model"]["eval/reward/overall"] != row["eval/reward/overall"]  # evaluation.weights is ema


def test_an_evaluation_without_text_encoders_is_that_with_them(
    tiny_pipeline_dir: Path, bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompts are the captions of the bank, encoded ahead."""
    kept = written(tmp_path, tiny_pipeline_dir, bank, "kept", phases=[{"iterations": 4, "learning_rate": 1e-3}])
    here(kept)
    dropped = written(
        tmp_path, tiny_pipeline_dir, bank, "dropped", phases=[{"iterations": 4, "learning_rate": 1e-3}],
        rollout={"text_encoders": "drop"},
    )  # fmt: skip
    encoded = CliRunner().invoke(app, ["precompute", str(dropped), "--json"])
    assert json.loads(encoded.stdout)["encoded"] == 6, encoded.output  # five prompts and the empty text
    monkeypatch.setattr("flowalign.run.encoded.subprocess.Popen", None)
    assert "none in rollout workers, 6 texts are read from" in here(dropped)
    found = [read_metrics(tmp_path / "runs" / name / "metrics.jsonl") for name in ("kept", "dropped")]
    scores = [[row["eval/reward/overall"] for row in rows if "eval/reward/overall" in row] for rows in found]
    assert scores[0] == scores[1] and len(scores[0]) == 2
