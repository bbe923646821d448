"""Runs, a bank, preferences with their cache and exports of commit 0f34c54 are read today.

How the files were made: ``written_by_0_1/make.py``.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.record.earlier import training_of_0_1

PACKED = Path(__file__).with_name("written_by_0_1") / "made.tar.xz"


def unpacked(to: Path) -> Path:
    with tarfile.open(PACKED) as packed:
        packed.extractall(to, filter="data")
    return to / "made"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(tmp_path_factory.mktemp("written"))


COMMANDS: dict[str, tuple[str, str | None]] = {
    "a run's weights as a pipeline": ("export runs/full --to full --as pipeline", "full/model_index.json"),
    "a run's average": ("export runs/base --to base --as ema", "base/model_index.json"),
    "a run's adapter": ("export runs/lora --to lora --as lora", "lora/pytorch_lora_weights.safetensors"),
    "images of a run": ("sample runs/lora --prompt circle --out of_run", "of_run"),
    "images of an export": ("sample exported --prompt circle --out of_export", "of_export"),
    "scores of a run": ("evaluate runs/full --json", None),
    "its bank is trained on": ("pretrain runs/base/config.yaml name=again", "runs/again/checkpoints/step_000002"),
    "its pairs are learned from": ("align dpo.yaml name=pairs", "runs/pairs/checkpoints/step_000002"),
    "its export is aligned": ("align full.yaml name=on model.path=exported", "runs/on/checkpoints/step_000002"),
    "its report is written again": ("report runs/dpo", "runs/dpo/report.html"),
}


@pytest.mark.parametrize("what", COMMANDS)
def test_what_version_0_1_wrote_is_read(what: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, left = COMMANDS[what]
    monkeypatch.chdir(folder)
    if left is not None and (folder / left).is_file():
        (folder / left).unlink()
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, done.output
    if left is None:
        assert 0 <= json.loads(done.stdout.splitlines()[-1])["metrics"]["eval/geneval_strict/overall"] <= 1
    else:
        assert (folder / left).exists()


@pytest.mark.parametrize("command", ["align full.yaml iterations=3", "pretrain base.yaml"])
def test_a_run_of_version_0_1_is_not_continued_and_nothing_of_it_is_touched(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = unpacked(tmp_path)
    monkeypatch.chdir(folder)
    if command.startswith("pretrain"):
        config = training_of_0_1(yaml.safe_load((folder / "base.yaml").read_text()))
        (folder / "base.yaml").write_text(yaml.safe_dump({**config, "phases": config["phases"] * 2}))
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}
    done = CliRunner().invoke(app, command.split())
    said = " ".join(done.output.split())
    assert done.exit_code == 2 and "and commit 3344061 is the last that can continue it" in said, done.output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not list((folder / "runs").glob("*/set_aside"))


def test_cached_latents_of_pairs_are_taken_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = unpacked(tmp_path)
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "preferences.cache").rglob("*") if path.is_file()}
    assert any(path.suffix == ".safetensors" for path in before)
    done = CliRunner().invoke(app, ["align", "dpo.yaml", "name=cached", "iterations=1"])
    assert done.exit_code == 0, done.output
    after = {path: path.stat().st_mtime_ns for path in (folder / "preferences.cache").rglob("*") if path.is_file()}
    assert after == before
