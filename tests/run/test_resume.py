"""What a run goes on from: the newest intact checkpoint, or the named one; the rest is passed over and kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from flowalign.config.run import CheckpointConfig, SafetyConfig
from flowalign.record.checkpoint import LOG, Checkpoint, CheckpointError, Say, find, latest, newest, read, steps
from flowalign.record.checkpointwriter import CheckpointWriter
from flowalign.record.metrics import read_metrics
from flowalign.run.resume import leave_behind
from flowalign.run.resume import resume_from as find_saved
from flowalign.safety.collapse import stopped_by_alarm

MOMENTS = {0: ({"exp_avg": torch.ones(2)}, {"step": 1})}


def resume_from(run_dir: Path, resume: str, say: Say = LOG.warning) -> Checkpoint | None:
    """As a driver does."""
    saved = find_saved(run_dir, resume, say)
    leave_behind(run_dir, resume, saved, say)
    return saved


def save(run_dir: Path, *at: int, optimizer: bool = True, value: float = 0.0) -> None:
    """Checkpoints of a run, and its metrics up to the last of them."""
    for step in at:
        CheckpointWriter(run_dir / "checkpoints", keep_last=9).save(
            step,
            model={"w": torch.full((2, 3), value or step)},
            ema={"w": torch.ones(2)},
            optimizer_by_rank=MOMENTS if optimizer else None,
            state={"iteration": step},
        )
    rows = "".join(json.dumps({"iteration": i}) + "\n" for i in range(at[-1] + 1))
    (run_dir / "metrics.jsonl").write_text(rows)
    (run_dir / "config.yaml").write_text("name: r\n")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def emptied(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def half(path: Path) -> None:
    for file in [*path.glob("*.json"), path / "optimizer"]:
        shutil.rmtree(file) if file.is_dir() else file.unlink()


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"\0")


def a_link_to_nowhere(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to("step_999999")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: (p / "model.safetensors").write_bytes(b"short"), "model.safetensors is truncated"),
    "grown": (lambda p: (p / "state.json").write_text(" " * 999), "state.json is truncated or has grown"),
    "flipped": (lambda p: flip(p / "ema.safetensors"), "ema.safetensors is corrupt"),
    "no_manifest": (lambda p: (p / "MANIFEST.json").unlink(), "no readable MANIFEST.json"),
    "nested": (lambda p: (p / "MANIFEST.json").write_text("[" * 100_000), "no readable MANIFEST.json"),
    "no_json": (lambda p: (p / "MANIFEST.json").write_bytes(b"\xff\xfe{"), "no readable MANIFEST.json"),
    "a_list": (lambda p: (p / "MANIFEST.json").write_text("[1, 2]"), "no readable MANIFEST.json"),
    "no_shard": (lambda p: (p / "optimizer" / "rank_00000.safetensors").unlink(), "rank_00000.safetensors cannot be"),
    "shard_a_folder": (lambda p: emptied_file(p / "optimizer" / "rank_00000.json"), "rank_00000.json cannot be read"),
    "a_fifo": (lambda p: fifo(p / "MANIFEST.json"), "no readable MANIFEST.json"),
    "weights_a_fifo": (lambda p: fifo(p / "model.safetensors"), "model.safetensors cannot be read (it is a FIFO)"),
    "half": (half, "no readable MANIFEST.json"),
    "empty": (emptied, "no readable MANIFEST.json"),
    "a_file": (a_file, "is not a directory"),
    "a_dead_link": (a_link_to_nowhere, "is not a directory"),
}


def emptied_file(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over_by_name_and_kept(tmp_path: Path, kind: str) -> None:
    damage, why = DAMAGES[kind]
    save(tmp_path, 10, 20)
    damage(tmp_path / "checkpoints" / "step_000020")
    said: list[str] = []
    saved = resume_from(tmp_path, "auto", said.append)
    assert saved is not None and saved.step == 10
    assert len(said) == 2 and "step_000020" in said[0] and why in said[0] and "step_000010, is taken" in said[0]
    kept = tmp_path / "set_aside" / "1"
    assert str(kept) in said[1] and list((kept / "checkpoints").glob("step_*")) == [
        kept / "checkpoints" / "step_000020"
    ]
    assert len(read_metrics(kept / "metrics.jsonl")) == 21
    said.clear()
    again = resume_from(tmp_path, "auto", said.append)
    assert again is not None and again.step == 10 and said == []


def test_a_checkpoint_without_optimizer_state_is_sampled_and_not_trained_on(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20, optimizer=False)
    assert find(tmp_path).name == "step_000020"
    said: list[str] = []
    saved = resume_from(tmp_path, "auto", said.append)
    assert saved is not None and saved.step == 10 and "holds no optimizer state" in said[0]


POINTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: p.unlink(), "latest is missing"),
    "empty": (lambda p: p.write_text(""), "latest names no checkpoint"),
    "binary": (lambda p: p.write_bytes(bytes(range(256))), "latest names no checkpoint"),
    "a_path": (lambda p: p.write_text("../../etc\n"), "latest names no checkpoint"),
    "absent": (lambda p: p.write_text("step_000030\n"), "latest names step_000030, which is not there"),
    "older": (lambda p: p.write_text("step_000010\n"), "latest names step_000010, which is older"),
    "a_folder": (emptied_file, "latest names no checkpoint"),
    "a_fifo": (lambda p: fifo(p), "latest names no checkpoint"),
    "a_link_to_nowhere": (lambda p: (p.unlink(), p.symlink_to("nowhere")), "latest is missing"),
    "a_copied_checkpoint": (
        lambda p: (p.unlink(), shutil.copytree(p.parent / "step_000010", p)),
        "latest names no checkpoint",
    ),
}


@pytest.mark.parametrize("kind", POINTERS)
def test_whatever_latest_says_the_newest_intact_checkpoint_is_taken_and_said_once(tmp_path: Path, kind: str) -> None:
    wrong, why = POINTERS[kind]
    save(tmp_path, 10, 20)
    wrong(tmp_path / "checkpoints" / "latest")
    said: list[str] = []
    assert find(tmp_path, say=said.append).name == "step_000020"
    saved = resume_from(tmp_path, "auto", said.append)
    assert saved is not None and saved.step == 20
    assert said[0] == said[1] and why in said[0] and len(said) == 2
    assert resume_from(tmp_path, "auto", said.append) is not None and len(said) == 2
    save(tmp_path, 30)
    assert find(tmp_path, say=said.append).name == "step_000030" and len(said) == 2


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_by_name_and_left_as_it_is(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    flip(tmp_path / "checkpoints" / "step_000010" / "model.safetensors")
    emptied(tmp_path / "checkpoints" / "step_000020")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        resume_from(tmp_path, "auto")
    assert "step_000010/model.safetensors is corrupt" in str(caught.value)
    assert "step_000020 has no readable MANIFEST.json" in str(caught.value)
    assert f"flowalign align {tmp_path / 'config.yaml'} name={tmp_path.name}-2" in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_lost_its_checkpoints_and_not_its_latest_is_not_begun_anew(tmp_path: Path) -> None:
    save(tmp_path, 10)
    shutil.rmtree(tmp_path / "checkpoints" / "step_000010")
    with pytest.raises(CheckpointError, match="latest is there and no checkpoint beside it"):
        resume_from(tmp_path, "auto")


def test_a_run_without_checkpoints_begins(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".tmp-1").mkdir(parents=True)
    assert resume_from(tmp_path, "auto") is None
    assert resume_from(tmp_path, "never") is None
    assert not (tmp_path / "set_aside").exists()


def test_going_back_keeps_what_came_later_as_a_run_and_happens_once(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30)
    for iteration in (0, 20, 30):
        (tmp_path / "samples" / f"iteration_{iteration:06d}").mkdir(parents=True)
    (tmp_path / "trackers.json").write_text("{}")
    said: list[str] = []
    saved = resume_from(tmp_path, "step_000010", said.append)
    assert saved is not None and saved.step == 10
    kept = tmp_path / "set_aside" / "1"
    assert len(said) == 1 and "step_000020, step_000030" in said[0] and str(kept) in said[0]
    assert steps(tmp_path / "checkpoints") == [10] and steps(kept / "checkpoints") == [20, 30]
    assert find(kept, say=said.append).name == "step_000030" and len(said) == 1
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["iteration_000000"]
    assert len(read_metrics(kept / "metrics.jsonl")) == 31 and (kept / "config.yaml").is_file()
    assert (kept / "trackers.json").exists() and not (tmp_path / "trackers.json").exists()
    save(tmp_path, 20, value=7)
    saved = resume_from(tmp_path, "step_000010", said.append)
    assert saved is not None and (saved.step, float(saved.model["w"][0, 0])) == (20, 7)
    assert len(said) == 1 and not (tmp_path / "set_aside" / "2").exists()


def test_a_run_that_was_continued_otherwise_in_between_can_go_back_again(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    assert resume_from(tmp_path, "step_000010", lambda text: None) is not None
    save(tmp_path, 20)
    saved = resume_from(tmp_path, "auto")
    assert saved is not None and saved.step == 20
    saved = resume_from(tmp_path, "step_000010", lambda text: None)
    assert saved is not None and saved.step == 10
    assert steps(tmp_path / "set_aside" / "2" / "checkpoints") == [20]


def test_the_newest_is_what_was_written_last_not_the_highest_step(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30)
    save(tmp_path, 20, value=7)
    assert find(tmp_path, say=lambda text: pytest.fail(text)).name == "step_000020"
    assert latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_000020"


@pytest.mark.parametrize("named", ["step_000015", "step_000020"])
def test_a_named_checkpoint_that_is_missing_or_damaged_is_refused_with_those_there(tmp_path: Path, named: str) -> None:
    save(tmp_path, 10, 20, 30)
    flip(tmp_path / "checkpoints" / "step_000020" / "optimizer" / "rank_00000.safetensors")
    with pytest.raises(CheckpointError, match=rf"^checkpoint.resume: .*{named}.*step_000010, .*step_000030"):
        resume_from(tmp_path, named)
    assert steps(tmp_path / "checkpoints") == [10, 20, 30] and not (tmp_path / "set_aside").exists()
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        resume_from(tmp_path / "absent", named)


def test_never_begins_anew_and_keeps_all_that_was_there(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    said: list[str] = []
    assert resume_from(tmp_path, "never", said.append) is None
    kept = tmp_path / "set_aside" / "1"
    assert len(said) == 1 and str(kept) in said[0]
    assert find(kept).name == "step_000020" and not (tmp_path / "metrics.jsonl").exists()


def test_a_run_whose_checkpoints_were_deleted_begins_anew_says_so_and_keeps_its_metrics(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / "samples").mkdir()
    shutil.rmtree(tmp_path / "checkpoints")
    said: list[str] = []
    assert resume_from(tmp_path, "auto", said.append) is None
    kept = tmp_path / "set_aside" / "1"
    assert said == [f"{tmp_path} is begun anew (it has no checkpoint); what it held is kept in {kept}"]
    assert len(read_metrics(kept / "metrics.jsonl")) == 11 and (kept / "samples").is_dir()
    assert not (tmp_path / "metrics.jsonl").exists() and (tmp_path / "config.yaml").is_file()
    assert resume_from(tmp_path, "auto", said.append) is None and len(said) == 1


@pytest.mark.parametrize("resume", ["step_000010", "never"])
def test_what_was_moved_away_and_linked_is_set_aside_as_a_link_that_leads_there(tmp_path: Path, resume: str) -> None:
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    save(run_dir, 10, 20)
    root = run_dir / "checkpoints"
    moved = root if resume == "never" else root / "step_000020"
    moved.rename(elsewhere)
    moved.symlink_to("../elsewhere" if resume == "never" else "../../elsewhere")
    resume_from(run_dir, resume, lambda text: None)
    assert find(run_dir / "set_aside" / "1").name == "step_000020" and not moved.exists()


def test_an_older_damaged_checkpoint_is_not_spoken_of(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    emptied(tmp_path / "checkpoints" / "step_000010")
    assert newest(tmp_path / "checkpoints", read, lambda text: pytest.fail(text)) is not None


def test_only_what_is_read_is_hashed(tmp_path: Path) -> None:
    save(tmp_path, 10)
    path = tmp_path / "checkpoints" / "step_000010"
    shutil.rmtree(path / "optimizer")
    flip(path / "ema.safetensors")
    assert find(tmp_path) == path
    with pytest.raises(CheckpointError, match=r"ema.safetensors is corrupt"):
        find(tmp_path, "ema")


@pytest.mark.parametrize("given", ["", "checkpoints", "checkpoints/latest", "checkpoints/step_000020"])
def test_a_run_its_folder_of_checkpoints_latest_and_a_checkpoint_are_all_found(tmp_path: Path, given: str) -> None:
    save(tmp_path, 10, 20)
    assert find(tmp_path / given).name == "step_000020"


def test_a_damaged_checkpoint_that_is_given_is_refused_with_commands_that_can_be_typed(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    emptied(tmp_path / "checkpoints" / "step_000020")
    with pytest.raises(CheckpointError) as caught:
        find(tmp_path / "checkpoints" / "step_000020")
    assert f"is {tmp_path}/checkpoints/step_000010: give that" in str(caught.value)
    assert f"`flowalign align {tmp_path}/config.yaml checkpoint.resume=step_000010`" in str(caught.value)
    (tmp_path / "config.yaml").write_text("latents: bank\n")
    with pytest.raises(CheckpointError, match=r"flowalign pretrain \S+ checkpoint.resume=step_000010`"):
        find(tmp_path / "checkpoints" / "step_000020")


@pytest.mark.parametrize("given", [20, "20", "step_20", "step_000020", "runs/a/checkpoints/step_000020/"])
def test_a_checkpoint_is_named_as_people_do(given: object) -> None:
    assert CheckpointConfig.model_validate({"resume": given}).resume == "step_000020"


@pytest.mark.parametrize("given", [False, True, 1.5, -3, "last", "step_x", "latest", None, [20]])
def test_what_names_no_checkpoint_is_refused_with_what_may_be_written(given: object) -> None:
    with pytest.raises(ValidationError, match="write auto, never, or the one to go back to, such as step_000020"):
        CheckpointConfig.model_validate({"resume": given})


def test_a_wrong_last_good_hides_no_good_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 3, 6, 9)
    config = SafetyConfig(window=3, stop=True, patience=2)
    invalid = [0.0] * 3 + [0.9] * 6
    rows = [
        {"iteration": i, "reward/invalid_fraction": share, "collapse/saturation": 0.5}
        for i, share in enumerate(invalid, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for text in ("", "step_000044"):
        (tmp_path / "checkpoints" / "last_good").write_text(text)
        stopped = stopped_by_alarm(tmp_path, config)
        assert stopped is not None and stopped.last_good == tmp_path / "checkpoints" / "step_000003"
