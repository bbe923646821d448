"""What users get wrong ends in one sentence and exit code 2, and leaves what was learned before as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from typer.testing import CliRunner

from flowalign.cli import app
from tests.fault.test_every_algorithm_resumes import CASES, config, write_pairs
from tests.fault.victim import content
from tests.tiny import write_config, write_configs_of_a_pipeline

OFFLINE = {"type": "diffusion_dpo", "source": "offline"}


def said(path: Path, *overrides: str, code: int = 2) -> str:
    """The one sentence of a ``flowalign align`` that is refused, or fails with another code."""
    done = CliRunner().invoke(app, ["align", str(path), *overrides])
    assert done.exit_code == code and isinstance(done.exception, SystemExit), done.output
    sentences = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1 and "Traceback" not in done.output
    return sentences[0].removeprefix("error: ")


def written(own: dict[str, Any]) -> Path:
    path = Path(own["runs_dir"]).parent / f"{own['name']}.yaml"
    path.write_text(yaml.safe_dump(own))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [dict(row) for row in Dataset.from_parquet(str(path))]  # type: ignore[arg-type]


def without_a_column(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "label_1"}


def with_a_broken_image(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "jpg_1": row["jpg_1"][:120]}


def tied(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "label_0": 0, "label_1": 0}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without_a_column, "has no column 'label_1'; a preference set has jpg_0, jpg_1, label_0, label_1, caption"),
        (with_a_broken_image, "row 0, jpg_1 is a damaged PNG file"),
        (tied, "are ties; there is nothing to learn from"),
    ],
)
def test_a_bad_preference_set_starts_no_run(change: Any, expected: str, tiny_pipeline_dir: Path, tmp_path: Path):
    pairs = write_pairs(tmp_path / "pairs.parquet")
    Dataset.from_list([change(row) for row in rows(pairs)]).to_parquet(str(pairs))
    data = {"groups_per_iteration": 4, "preferences": str(pairs)}
    sentence = said(written(content("bad", tmp_path, tiny_pipeline_dir, algorithm=OFFLINE, data=data, rewards=[])))
    assert sentence.startswith("data.preferences: ") and expected in sentence and str(pairs) in sentence
    assert not (tmp_path / "runs" / "bad" / "checkpoints").exists()


def test_a_teacher_of_another_latent_shape_is_refused_before_a_weight_is_read(tmp_path: Path):
    path = write_config(tmp_path)
    teacher = write_configs_of_a_pipeline(tmp_path / "small") / "transformer" / "config.json"
    teacher.write_text(json.dumps({**json.loads(teacher.read_text()), "sample_size": 4}))
    sentence = said(path, "algorithm={type: opd, teachers: {t: {path: small}}}", "rewards=[]")
    assert sentence.startswith("algorithm.teachers.t.path: ")
    assert "small has latents of (16, 4, 4), the model's are (16, 8, 8)" in sentence
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("algorithm", ["type: flow_grpo", "type: opd, teachers: {t: {path: model}}"])
@pytest.mark.parametrize("window", ["{kind: fixed, size: 0}", "{kind: random, size: 0}", "{kind: full, start: 10}"])
def test_a_window_of_no_step_is_refused_by_its_key(algorithm: str, window: str, tmp_path: Path):
    sentence = said(write_config(tmp_path), f"algorithm={{{algorithm}, window: {window}}}")
    assert sentence.startswith("algorithm.window"), sentence
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("case", ["flow_grpo random window", "dpo online", "dpo offline", "opd", "nft", "sft", "awm"])
def test_a_learning_rate_that_destroys_the_weights_stops_the_run_and_saves_nothing(
    case: str, tiny_pipeline_dir: Path, tmp_path: Path
):
    """The first update is finite and throws the weights to 1e30; nothing of them is kept, and that is said again."""
    own = config("nan", case, tmp_path, tiny_pipeline_dir)
    own["checkpoint"] = {"every": 1}
    own["learner"] |= {"optimizer": {"learning_rate": 1e30}, "updates_per_iteration": 1}
    path, saved = written(own), tmp_path / "runs" / "nan" / "checkpoints"
    for _ in range(2):
        assert "has destroyed the weights" in said(path, code=1)
        assert not list(saved.glob("*step_*"))


def test_every_algorithm_is_among_the_runs():
    assert {str(algorithm["type"]) for algorithm, _ in CASES.values()} == {
        "flow_grpo",
        "diffusion_dpo",
        "opd",
        "nft",
        "sft",
        "awm",
    }
