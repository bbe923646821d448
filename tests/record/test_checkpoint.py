"""Checkpoints: atomic under SIGKILL, hashed, and honest about what is wrong."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.record.checkpoint import CheckpointError, content_hash, latest, load
from flowalign.record.checkpointwriter import CheckpointWriter, is_loss
from tests.record.writer import write_on


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a.weight": torch.randn(4, 3, generator=generator), "b": torch.randn((), generator=generator).bfloat16()}


def save(root: Path, step: int, keep_last: int = 0, keep_best: int = 0, **metrics: float) -> Path:
    optimizer = {rank: ({"exp_avg/b": torch.full((2,), float(rank))}, {"rank": rank}) for rank in range(2)}
    return CheckpointWriter(root, keep_last=keep_last, keep_best=keep_best, best_metric="score").save(
        step,
        model=weights(step),
        ema=weights(-step),
        optimizer_by_rank=optimizer,
        state={"metrics": metrics, "at": step},
    )


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_loaded_checkpoint_equals_the_saved_one_bitwise(tmp_path: Path) -> None:
    path = save(tmp_path, 20)
    assert path == tmp_path / "step_000020" == latest(tmp_path)
    loaded = load(path)
    assert loaded.ema is not None
    assert content_hash(loaded.model) == content_hash(weights(20))
    assert content_hash(loaded.ema) == content_hash(weights(-20))
    assert (loaded.step, loaded.state) == (20, {"metrics": {}, "at": 20})
    assert [loaded.optimizer_by_rank[rank][1] for rank in range(2)] == [{"rank": 0}, {"rank": 1}]
    assert torch.equal(loaded.optimizer_of(1)[0]["exp_avg/b"], torch.ones(2))
    assert loaded.optimizer_of(5)[1] == {"rank": 0}
    wanted = ["MANIFEST.json", "ema.safetensors", "model.safetensors", "optimizer", "state.json"]
    assert names(path) == wanted
    assert names(tmp_path) == ["latest", "step_000020"]


def test_a_run_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "absent") is None


@pytest.mark.parametrize("position", [0, 20, -1])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer/rank_00001.safetensors", "state.json"])
def test_one_changed_byte_is_found_and_the_intact_checkpoint_named(tmp_path: Path, name: str, position: int) -> None:
    save(tmp_path, 10)
    path = save(tmp_path, 20)
    content = bytearray((path / name).read_bytes())
    content[position] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} is corrupt.*step_000010: give that"):
        load(path)


def test_a_changed_manifest_a_truncated_and_a_missing_file_are_found(tmp_path: Path) -> None:
    def broken(change: Any) -> str:
        path = save(tmp_path, 20)
        change(path)
        with pytest.raises(CheckpointError) as caught:
            load(path)
        return str(caught.value)

    manifest = "MANIFEST.json"
    assert "corrupt" in broken(lambda p: (p / manifest).write_text((p / manifest).read_text().replace("20", "21", 1)))
    assert "truncated" in broken(lambda p: (p / "ema.safetensors").write_bytes(b"short"))
    assert "cannot be read" in broken(lambda p: (p / "model.safetensors").unlink())
    assert "no readable MANIFEST.json" in broken(lambda p: (p / manifest).unlink())
    assert "no other intact checkpoint" in broken(lambda p: (p / manifest).write_text("{"))


def test_foreign_and_missing_directories_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="so it is no checkpoint"):
        load(tmp_path / "other")
    with pytest.raises(CheckpointError, match="is not a directory"):
        load(tmp_path / "step_000001")


def test_where_latest_names_a_missing_checkpoint_the_one_that_is_there_is_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 10)
    shutil.rmtree(save(tmp_path, 20))
    assert latest(tmp_path) == tmp_path / "step_000010"


def test_retention_keeps_the_last_the_best_and_latest(tmp_path: Path) -> None:
    for step, score in enumerate([0.1, 0.9, float("nan"), 0.2, 0.3], start=1):
        save(tmp_path, step, keep_last=2, keep_best=1, score=score)
    assert names(tmp_path) == ["latest", "step_000002", "step_000004", "step_000005"]
    save(tmp_path, 6, keep_last=1, keep_best=9, score=0.0)
    assert names(tmp_path) == ["latest", "step_000002", "step_000004", "step_000005", "step_000006"]


def test_the_best_of_a_loss_is_its_lowest() -> None:
    losses = ("loss", "validation/loss", "validation_ema/loss_t0.06", "loss/velocity_mse")
    assert all(map(is_loss, losses)) and not any(map(is_loss, ("eval/geneval/overall", "reward/lossless/mean")))


def test_a_checkpoint_that_was_moved_away_and_linked_stays_there_and_ends_no_saving(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    save(root, 1, keep_last=1).rename(elsewhere)
    (root / "step_000001").symlink_to(elsewhere)
    for step in (2, 3):
        save(root, step, keep_last=1)
    assert names(root) == ["latest", "step_000003"] and load(elsewhere).step == 1
    (root / "step_000004").symlink_to(elsewhere)
    assert load(save(root, 4, keep_last=1)).step == 4 and load(elsewhere).step == 1


def test_going_back_and_saving_an_old_step_again_replaces_it(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    writer = CheckpointWriter(tmp_path, keep_last=2)
    path = writer.save(20, model=weights(99), state={})
    assert latest(tmp_path) == path
    assert content_hash(load(path).model) == content_hash(weights(99))
    assert names(tmp_path) == ["latest", "step_000020", "step_000030"]
    again = writer.save(20, model=weights(98), state={})
    assert latest(tmp_path) == again == path
    assert content_hash(load(path).model) == content_hash(weights(98))


@pytest.mark.fault
def test_a_writer_killed_at_any_moment_leaves_latest_intact(tmp_path: Path) -> None:
    leftovers, step = 0, 1
    server: Any = multiprocessing.get_context("forkserver")  # which imports once for all writers
    server.set_forkserver_preload(["tests.record.writer"])
    for trial in range(6):
        wrote = server.Event()
        writer = server.Process(target=write_on, args=(tmp_path, step, wrote))
        writer.start()
        assert wrote.wait(timeout=120)
        time.sleep(0.037 * trial)
        writer.kill()
        writer.join()
        leftovers += len(list(tmp_path.glob(".tmp-*")))
        path = latest(tmp_path)
        assert path is not None
        found = load(path)
        assert found.state == {"step": found.step}
        assert all(torch.equal(tensor, torch.full((20_000,), float(found.step))) for tensor in found.model.values())
        step = found.step + 1
    assert leftovers > 0, "no kill hit a writer in the middle: the test shows nothing"
    CheckpointWriter(tmp_path).save(step, model=weights(0), state={})
    assert not list(tmp_path.glob(".tmp-*"))


def test_the_content_hash_sees_name_dtype_shape_and_sign_of_zero() -> None:
    zero = torch.zeros(2, 3)
    different = [
        {"a": zero},
        {"b": zero},
        {"a": zero.reshape(3, 2)},
        {"a": zero.to(torch.int32)},
        {"a": -zero},
        {"a": zero, "b": torch.zeros(0)},
    ]
    assert len({content_hash(weights) for weights in different}) == len(different)
    assert content_hash({"a": zero, "b": zero}) == content_hash({"b": zero, "a": zero.T.contiguous().T})


def test_state_is_plain_json_and_nothing_is_pickled(tmp_path: Path) -> None:
    path = save(tmp_path, 1, score=0.5)
    assert json.loads((path / "state.json").read_text())["metrics"] == {"score": 0.5}
    assert {file.suffix for file in path.rglob("*.*")} == {".json", ".safetensors"}
