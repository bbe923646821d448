"""What a damaged checkpoint's error advises can be pasted into a shell, and works."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.record.checkpoint import steps
from tests.fault.test_full_disks import align, run


@pytest.fixture(scope="module")
def made(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints, in a folder whose name a shell would take apart."""
    folder = tmp_path_factory.mktemp("made") / "it's a run"
    folder.mkdir()
    quiet = {"evaluation": {"every": 0}, "checkpoint": {"every": 1, "keep_last": 3}}
    align(run(folder, tiny_pipeline_dir, **quiet), folder / "runs")
    return folder


def ends_with_2(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    sentences = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.exit_code == 2 and len(sentences) == 1, done.output
    return sentences[0]


def pasted(sentence: str) -> str:
    """Runs the command that stands between backquotes, as a shell takes it apart."""
    command = re.search(r"`flowalign ([^`]+)`", sentence)
    assert command, sentence
    done = CliRunner().invoke(app, shlex.split(command[1]))
    assert done.exit_code == 0, f"{sentence}\n{done.output}"
    return done.output


def cut(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"short")


def a_fifo(path: Path) -> None:
    (path / "MANIFEST.json").unlink()
    os.mkfifo(path / "MANIFEST.json")


@pytest.mark.parametrize("damage", [cut, *(pytest.param(d, marks=pytest.mark.slow) for d in (a_fifo, shutil.rmtree))])
def test_a_damaged_or_missing_checkpoint_is_answered_with_a_command_that_trains_on(
    damage: Callable[[Path], object], made: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "it's a copy"
    shutil.copytree(made, folder)
    run_dir = folder / "runs" / "r"
    damage(run_dir / "checkpoints" / "step_000003")
    config = str(run_dir / "config.yaml")
    named = ends_with_2("align", config, "checkpoint.resume=step_000003")
    assert "step_000001, step_000002, as in `flowalign align" in named
    given = ends_with_2("export", str(run_dir / "checkpoints" / "step_000003"), "--to", str(tmp_path / "out"))
    assert "checkpoints/step_000002: give that" in given
    assert re.findall("`.*`", named) == re.findall("`.*`", given)
    assert f"resuming {run_dir} after iteration 2" in pasted(named)
    assert steps(run_dir / "checkpoints") == [1, 2, 3]


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/latest"])
@pytest.mark.parametrize("latest", ["empty", pytest.param("a folder", marks=pytest.mark.slow)])
def test_a_run_without_an_intact_checkpoint_is_looked_for_in_its_own_folder_and_another_is_begun(
    where: str, latest: str, made: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    root = folder / "runs" / "r" / "checkpoints"
    shutil.rmtree(root)
    root.mkdir()
    (root / "latest").mkdir() if latest == "a folder" else (root / "latest").write_text("")
    said = ends_with_2("export", str(folder / "runs" / "r" / where), "--to", str(tmp_path / "out"))
    assert said.startswith(f"{root} holds no intact checkpoint: {root}/latest is there and no checkpoint beside it; ")
    (folder / "runs" / "r-2").mkdir()
    if where == "":
        said = ends_with_2("export", str(folder / "runs" / "r"), "--to", str(tmp_path / "out"))
        assert "run directory: " in pasted(said) and steps(folder / "runs" / "r-3" / "checkpoints") == [1, 2, 3]


@pytest.mark.slow
def test_what_was_set_aside_is_trained_on_where_it_lies(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    run_dir = folder / "runs" / "r"
    align(run_dir / "config.yaml", folder / "runs", "checkpoint.resume=step_000001")
    kept = run_dir / "set_aside" / "1"
    assert steps(kept / "checkpoints") == [2, 3]
    cut(kept / "checkpoints" / "step_000003")
    said = ends_with_2("sample", str(kept / "checkpoints" / "step_000003"), "--prompt", "a dog", "--out", str(tmp_path))
    assert f"resuming {kept} after iteration 2" in pasted(said)
    assert steps(run_dir / "checkpoints") == [1, 2, 3]
