"""Resumption: the checkpoint that a run goes on from, and what is set aside for it.

Nothing that was computed is lost, nothing mixed up.

A run that goes back to ``step_000010`` may have ``step_000020`` already, and metrics of iterations that it will do
again. They go to ``set_aside/<n>``, which is a run directory as well: it is reported, sampled and exported as any
other.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from flowalign.record import checkpoint
from flowalign.record.checkpoint import LATEST, Checkpoint, CheckpointError, Say
from flowalign.record.checkpointwriter import CheckpointWriter
from flowalign.record.destroyed import fault_of_state, fault_of_zeros
from flowalign.record.disk import swept, write_text, writing
from flowalign.record.kinds import read_regular
from flowalign.record.log import LOG
from flowalign.record.manifest import LAST_OF_1, VERSION, entries, going_on, has_sizes
from flowalign.record.mirror import FILE as TRACKERS

SET_ASIDE = "set_aside"
RETURNED = "returned_to"


def resume_from(run_dir: Path, resume: str, say: Say = LOG.warning) -> Checkpoint | None:
    """Return the checkpoint that the run goes on from, read whole.

    It is None where it begins. ``resume`` is auto, never or a checkpoint's name.

    Damaged newer ones are passed over. A run goes back to a named one once: the same command, given again after an
    interruption, goes on from what has been made since. Nothing is written, see `leave_behind`.

    Raises:
        CheckpointError: the named one is not there or damaged, or there are some and none is intact.
    """
    root = run_dir / "checkpoints"
    if resume == "never":
        return None
    if resume == "auto" or _returned(root) == resume:
        found = checkpoint.newest(root, _resumable, say)
        return None if found is None else found.made
    try:
        return _resumable(root / resume)
    except CheckpointError as error:
        there = ", ".join(path.name for path in entries(root) if path.name != resume and has_sizes(path))
        wrong = str(error) if (root / resume).exists() else f"{root / resume} is not there"
        command = going_on(run_dir)
        other = f"name another: {there}" + (f", as in `{command}`" if command else "")
        other = other if there else f"{run_dir} has no checkpoint"
        raise CheckpointError(f"checkpoint.resume: {wrong}; {other}") from error


def refuse_older(saved: Checkpoint | None) -> None:
    """Raise CheckpointError where an older version wrote what a run would go on from; to read it is another matter."""
    if saved is not None and saved.version < VERSION:
        run_dir = saved.path.parent.parent
        raise CheckpointError(
            f"{run_dir} was written by an older version, and commit {LAST_OF_1} is the last that can continue it; use "
            "that one, or begin a run of another name from its weights: `flowalign export RUN --to DIR --as pipeline`, "
            "then model.path=DIR"
        )


def leave_behind(run_dir: Path, resume: str, saved: Checkpoint | None, say: Say = LOG.warning) -> None:
    """Set aside what the run does not go on from, before the first file is written; ``say`` gets a line of it.

    Of ``saved`` everything newer is; where nothing is gone on from, all that the run directory holds.
    """
    root = run_dir / "checkpoints"
    if saved is None:
        there = checkpoint.has_any(root)
        if there or any((run_dir / name).exists() for name in ("metrics.jsonl", "samples")):
            why = f"resume: {resume}" if there or resume == "never" else "it has no checkpoint"
            with writing(str(run_dir / SET_ASIDE), run_dir):
                kept = set_aside_all(run_dir)
            say(f"{run_dir} is begun anew ({why}); what it held is kept in {kept}")
        return
    newer = checkpoint.newer_than(saved.path)
    if newer:
        with writing(str(run_dir / SET_ASIDE), run_dir):
            kept = set_aside(run_dir, newer, saved.step)
        say(
            f"going on from {saved.path}; {', '.join(path.name for path in newer)} and later metrics are kept in {kept}"
        )
    CheckpointWriter(root).point(LATEST, saved.path.name)
    if resume == "auto":
        with suppress(OSError):
            (root / RETURNED).unlink()
    elif _returned(root) != resume:
        write_text(root / RETURNED, f"{resume}\n")


def set_aside(run_dir: Path, checkpoints: Sequence[Path], step: int) -> Path:
    """Move ``checkpoints`` and the samples after ``step`` to a directory of their own; metrics and configuration are
    copied. Returns it."""
    with swept(_new(run_dir)) as kept:  # only what is copied can fail for want of room
        for name in ("config.yaml", "metrics.jsonl"):
            if (run_dir / name).is_file():
                shutil.copy2(run_dir / name, kept / name)
    if (run_dir / TRACKERS).exists():  # what trackers have goes beyond the step: they begin another record
        _move(run_dir / TRACKERS, kept / TRACKERS)
    for path in checkpoints:
        _move(path, kept / "checkpoints" / path.name)
    for path in run_dir.glob("samples/iteration_*"):
        if path.name.removeprefix("iteration_").isdigit() and int(path.name.removeprefix("iteration_")) > step:
            (kept / "samples").mkdir(exist_ok=True)
            _move(path, kept / "samples" / path.name)
    with suppress(CheckpointError):
        newest = checkpoint.latest(kept / "checkpoints")
        assert newest is not None
        CheckpointWriter(newest.parent).point(LATEST, newest.name)
    return kept


def set_aside_all(run_dir: Path) -> Path:
    """Move all that a run has made; the configuration is copied."""
    with swept(_new(run_dir)) as kept:
        (kept / "checkpoints").rmdir()
        if (run_dir / "config.yaml").is_file():
            shutil.copy2(run_dir / "config.yaml", kept)
    for name in ("metrics.jsonl", "samples", "report.html", "checkpoints", TRACKERS):
        if (run_dir / name).exists():
            _move(run_dir / name, kept / name)
    return kept


def _move(path: Path, to: Path) -> None:
    """Move something aside; a link still leads to where somebody has moved what was there."""
    if path.is_symlink():
        to.symlink_to(path.parent.absolute() / path.readlink())
        path.unlink()
    else:
        path.rename(to)


def _new(run_dir: Path) -> Path:
    folder = run_dir / SET_ASIDE
    used = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    kept = folder / str(1 + max(used, default=0))
    (kept / "checkpoints").mkdir(parents=True)
    return kept


def _returned(root: Path) -> str | None:
    """Return the name of the checkpoint that this run went back to already."""
    try:
        return read_regular(root / RETURNED).decode("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _resumable(path: Path) -> Checkpoint:
    found = checkpoint.read(path)
    found.optimizer_of(0)
    weights = {"model": found.model, **({} if found.ema is None else {"ema": found.ema}), **found.averages}
    moments = [tensors for tensors, _ in found.optimizer_by_rank.values()]
    wrong = fault_of_zeros(weights) or fault_of_state(weights, moments)
    if wrong is not None:  # an older version saved these too
        raise CheckpointError(f"{path} holds a state that was destroyed, {wrong}")
    return found
