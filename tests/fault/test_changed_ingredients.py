"""Commands that go on with a run whose model, preferences or teacher became others meanwhile; all of it real files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from flowalign.record import checkpoint
from tests.data.test_preferences import table, write_parquet
from tests.run.test_moved_runs import CONFIG, done, project, refused

DPO = {"type": "diffusion_dpo", "source": "offline", "beta": 500}
OPD = {"type": "opd", "teachers": {"t": {"path": "teacher"}}, "num_steps": 2, "kind": "flow", "noise_level": 0.6}
RUNS: dict[str, dict[str, Any]] = {
    "model": {},
    "data.preferences": {
        "algorithm": DPO,
        "rewards": [],
        "data": {"groups_per_iteration": 2, "preferences": "pairs.parquet"},
        "evaluation": {"every": 0},
    },
    "algorithm.teachers.t.path": {"algorithm": OPD, "rewards": []},
}


def one_tensor(folder: Path) -> Path:
    """Add one to a tensor of a part of a pipeline."""
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] + 1}, file, {"format": "pt"})
    return file


def turned_pairs(file: Path) -> Path:
    """The same pictures, of which the others are preferred now."""
    rows = [{**row, "label_0": row["label_1"], "label_1": row["label_0"]} for row in table()]
    return write_parquet(file, rows)


def begun(folder: Path, pipeline: Path, kind: str) -> Path:
    """The configuration of a run of one iteration."""
    work = project(folder, pipeline)
    shutil.copytree(pipeline, work / "teacher")
    one_tensor(work / "teacher" / "transformer")  # a teacher that is the student teaches nothing
    write_parquet(work / "pairs.parquet", table())
    content = {**CONFIG, "name": "one", "iterations": 1, "runs_dir": str(work / "runs"), **RUNS[kind]}
    (work / "one.yaml").write_text(yaml.safe_dump(content))
    done("align", work / "one.yaml")
    return work


@pytest.mark.fault
def test_another_autoencoder_or_text_encoder_is_refused_by_the_command(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    work, model = begun(tmp_path, tiny_pipeline_dir, "model"), tmp_path / "models" / "base"
    for part in ("vae", "text_encoder"):
        shutil.copytree(model / part, tmp_path / "kept" / part)
        assert_refused(work, "model.path", one_tensor(model / part))
        shutil.rmtree(model / part)
        (tmp_path / "kept" / part).rename(model / part)


@pytest.mark.fault
def test_pairs_whose_preference_was_turned_are_refused_by_the_command(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    work = begun(tmp_path, tiny_pipeline_dir, "data.preferences")
    assert_refused(work, "data.preferences", turned_pairs(work / "pairs.parquet"))


@pytest.mark.fault
def test_another_teacher_is_refused_and_taken_once_it_is_accepted(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    work, key = begun(tmp_path, tiny_pipeline_dir, "algorithm.teachers.t.path"), "algorithm.teachers.t.path"
    assert_refused(work, key, one_tensor(work / "teacher" / "transformer"))
    done("align", work / "one.yaml", "iterations=2", "--accept-changed", key)
    state = checkpoint.load(work / "runs" / "one" / "checkpoints" / "step_000002").state
    assert [change["key"] for change in state["accepted_changes"]] == [key]


def assert_refused(work: Path, key: str, file: Path) -> None:
    run = work / "runs" / "one"
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    said = refused("align", work / "one.yaml", "iterations=2")
    assert f"error: {key}: " in said and file.name in said and "since step_000001 was written" in said, said
    assert said.endswith(f"--accept-changed {key}")
    assert before == {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
