"""Scorers that an evaluation only measures."""

from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console

from flowalign.measure.evaluate import evaluate_checkpoint
from flowalign.record.metrics import read_metrics
from flowalign.run.drive import drive
from flowalign.samples.sampled import sampled_model
from tests.cluster.runs import small_config

EVALUATION = {"every": 2, "num_samples": 6, "num_steps": 2}


def test_a_run_and_a_later_evaluation_measure_them_beside_geneval(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def bright(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    config = small_config(
        tiny_pipeline_dir,
        tmp_path,
        cluster={"backend": "local"},
        runs_dir=str(tmp_path / "runs"),
        evaluation={**EVALUATION, "gold": [{"spec": "own.py:bright"}]},
        logging={"wandb": "disabled"},
    )
    run_dir = drive(config, tmp_path, Console(quiet=True))
    evaluated = [row for row in read_metrics(run_dir / "metrics.jsonl") if "eval/bright/overall" in row]
    assert [row["iteration"] for row in evaluated] == [0, 2]
    assert all("eval/geneval/overall" in row and "reward/bright/mean" not in row for row in evaluated)
    later = evaluate_checkpoint(sampled_model(run_dir, config), base_dir=tmp_path)
    assert later.metrics["eval/bright/overall"] == pytest.approx(evaluated[-1]["eval/bright/overall"], abs=1e-9)
    assert {row["score"] for row in later.rows} <= {0.0, 1.0}  # GenEval's verdicts, not brightness


def test_two_of_one_name_are_refused(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"evaluation\.gold: two scorers share a name"):
        small_config(tiny_pipeline_dir, tmp_path, cluster={}, evaluation={**EVALUATION, "gold": [{"spec": "geneval"}]})
