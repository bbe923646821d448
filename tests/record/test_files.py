"""Every file that is written has the mode that the umask gives: others on the machine read it or do not, alike."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from flowalign.config.logging import LoggingConfig
from flowalign.config.sections import RewardConfig
from flowalign.data.banks.files import write_json, write_tensors
from flowalign.export import export
from flowalign.intake.resolved import write_resolved
from flowalign.making.merge import merge
from flowalign.making.preferences import make_preferences
from flowalign.record.checkpointwriter import CheckpointWriter
from flowalign.record.disk import DiskError
from flowalign.record.files import only_one, save_tensors
from flowalign.record.metrics import MetricsWriter
from flowalign.samples.sampled import sample_checkpoint, sampled_model
from tests.tiny import run_config, write_checkpoint, write_pipeline


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(directory: Path) -> set[int]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert files
    return {stat.S_IMODE(path.stat().st_mode) for path in files}


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_checkpoints_banks_and_what_lies_beside_them_have_the_umasks_mode(tmp_path: Path, mask: int) -> None:
    weights, config = {"w": torch.ones(2, 3).T}, run_config(tmp_path)
    with umask(mask):
        write_resolved(config, tmp_path / "run")
        MetricsWriter(tmp_path / "run", "run", LoggingConfig(wandb="disabled")).write(1, {"a": 1.0}, wall_s=0.0)
        writer = CheckpointWriter(tmp_path / "run" / "checkpoints")
        writer.save(1, model=weights, ema=weights, optimizer_by_rank={0: (weights, {})}, state={})
        writer.mark_good(1)
        write_tensors(tmp_path / "run" / "shard.safetensors", weights)
        write_json(tmp_path / "run" / "manifest.json", {})
    assert modes(tmp_path / "run") == {0o666 & ~mask}


def test_a_file_that_only_its_owner_could_read_is_written_over_with_the_umasks_mode(tmp_path: Path) -> None:
    path = tmp_path / "latents.safetensors"
    path.touch(0o600)
    with umask(0o022):
        save_tensors({"w": torch.ones(2)}, path)
    assert modes(tmp_path) == {0o644}


def test_what_other_libraries_write_for_us_has_the_umasks_mode(tmp_path: Path) -> None:
    base = write_pipeline(tmp_path / "base")
    config, whole = run_config(base, lora=True), run_config(base)
    lora, run = (write_checkpoint(tmp_path / c, made) for c, made in (("lora_run", config), ("run", whole)))
    write_resolved(whole, tmp_path / "run")
    out = tmp_path / "out"
    out.mkdir()
    with umask(0o027):
        export(lora, out / "lora", kind="lora", config=config)
        export(run, out / "pipeline", config=whole)
        merge([tmp_path / "run", tmp_path / "run"], out / "merged")
        sample_checkpoint(sampled_model(run, whole, num_steps=1), ["a red circle"], out / "images", save_latents=True)
        bright = tmp_path / "bright.py"
        bright.write_text(
            "def reward(images, prompts, metadata):\n    return images.reshape(len(images), -1).mean(1)\n"
        )
        reward = RewardConfig(spec=f"{bright}:reward")
        model = sampled_model(run, whole)
        make_preferences(model, reward, out / "pairs", prompts="shapes:train", pairs=1, group_size=2)
    assert {path.suffix for path in out.rglob("*")} >= {".safetensors", ".json", ".md", ".png", ".parquet"}
    assert modes(out) == {0o640}


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("{tmp}/file/lock", "Not a directory"),
        ("{tmp}/gone/lock", "No such file or directory"),
        ("{tmp}/" + 300 * "l", "File name too long"),
        ("/proc/lock", "No such file or directory"),  # a disk that takes no file of anybody
    ],
)
def test_a_folder_that_takes_no_lock_is_named_with_the_reason(tmp_path: Path, place: str, why: str) -> None:
    (tmp_path / "file").touch()
    path = place.format(tmp=tmp_path)
    with pytest.raises(DiskError, match=f"^{path} cannot be written: .*{why}"), only_one(Path(path)):
        pytest.fail("nothing is locked")
