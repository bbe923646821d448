"""A run that is refused leaves no directory, and one that was there as it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flowalign.cli import app
from tests.fault.test_bad_input import said, written
from tests.fault.victim import content

ALGORITHM = {"type": "flow_grpo", "group_size": 3, "num_steps": 4, "window": {"kind": "fixed", "start": 1, "size": 2}}
BROKEN = """class Reward:
    def __init__(self):
        raise OSError("no weights")

    def score(self, images, prompts, metadata): ...
"""
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "a reward that does not load": ({"rewards": [{"spec": "broken.py:Reward"}]}, "could not be built: OSError"),
    "more GPUs than there are": ({"cluster": {"backend": "ray", "rollout_gpus": 3}}, "GPU"),
    "a calibration of another kind": (
        {"rollout": {"cache": {"calibration": "broken.py"}}},
        "rollout.cache.calibration",
    ),
}


def refusal(model: Path, folder: Path, **sections: Any) -> str:
    return said(written(content("refused", folder, model, algorithm=ALGORITHM, **sections)))


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("there", [False, True])
def test_a_refused_run_leaves_no_directory_and_changes_none(
    case: str, there: bool, tiny_pipeline_dir: Path, tmp_path: Path
):
    (tmp_path / "broken.py").write_text(BROKEN)
    sections, expected = CASES[case]
    run = tmp_path / "runs" / "refused"
    if there:
        run.mkdir(parents=True)
        (run / "config.yaml").write_text("name: refused\n")
    assert expected in refusal(tiny_pipeline_dir, tmp_path, **sections)
    assert files(tmp_path / "runs") == ({"refused/config.yaml": b"name: refused\n"} if there else {})
    assert there or not (tmp_path / "runs").exists()


def test_a_model_without_weights_leaves_no_directory(tiny_pipeline_dir: Path, tmp_path: Path):
    model = tmp_path / "model"
    for file in tiny_pipeline_dir.rglob("*"):
        if file.is_file() and "safetensors" not in file.name:
            (model / file.relative_to(tiny_pipeline_dir)).parent.mkdir(parents=True, exist_ok=True)
            (model / file.relative_to(tiny_pipeline_dir)).write_bytes(file.read_bytes())
    assert "model.path" in refusal(model, tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_runs_dir_that_is_a_file_is_refused_before_a_weight_is_read(tiny_pipeline_dir: Path, tmp_path: Path):
    (tmp_path / "runs").write_text("mine")
    assert refusal(tiny_pipeline_dir, tmp_path).startswith("runs_dir: ")
    assert (tmp_path / "runs").read_text() == "mine"


@pytest.mark.parametrize("name", ["text_encoder/config.json", "tokenizer/tokenizer_config.json"])
def test_a_model_with_a_damaged_text_file_ends_in_one_sentence(name: str, tiny_pipeline_dir: Path, tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(tiny_pipeline_dir, model)
    (model / name).write_text("[]")
    assert refusal(model, tmp_path).startswith("model.path: ")
    assert not (tmp_path / "runs").exists()


def test_what_differs_from_the_file_and_what_hardly_was_meant_is_said_at_the_start(
    tiny_pipeline_dir: Path, tmp_path: Path
):
    (tmp_path / "broken.py").write_text(BROKEN)
    path = written(content("refused", tmp_path, tiny_pipeline_dir, algorithm=ALGORITHM))
    warm = "learner.optimizer={learning_rate: 5e-4, warmup_steps: 20}"
    done = CliRunner().invoke(app, ["align", str(path), "rewards=broken.py:Reward", warm])
    assert done.exit_code == 2
    lines = done.stdout.splitlines()
    changed = "learner.optimizer.learning_rate 0.001 → 5e-4; learner.optimizer.warmup_steps → 20"
    assert any(line.startswith("overrides: ") and changed in line for line in lines)
    assert (
        "warning: learner.optimizer.warmup_steps: 20 of 20 updates; the learning rate never gets beyond" in done.stdout
    )
