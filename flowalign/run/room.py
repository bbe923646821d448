"""Room on the disk of a run directory for the checkpoints to come, asked for before anything starts."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

from flowalign.config.run import RunConfig
from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.models.inspect import most_trained, trained_parameters
from flowalign.plan.disk import Size, checkpoint_size
from flowalign.record import checkpoint
from flowalign.record.checkpoint import HIDDEN, SPARE, CheckpointError
from flowalign.record.disk import free_bytes, on_disk, size_text
from flowalign.record.manifest import manifest_of, manifests


def check_room(config: RunConfig, run_dir: Path) -> str | None:
    """Return a line where there is not room for all the checkpoints that are kept at a time.

    It is None where there is, or where neither size nor room is known.

    Raises:
        ConfigError: not even the next one fits.
    """
    root = run_dir / "checkpoints"
    to_come, resume = _to_come(config, root)
    if not to_come:
        return None
    there = 0 if resume == "never" else len(manifests(root))
    kept, keys = _kept(config)
    more = max(1, min(there + to_come, kept + 1) - there)  # the next one is written before the oldest is deleted
    free, limit = _free(root), resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    limited = limit != resource.RLIM_INFINITY
    size = _size(config, root, most_trained)
    if size is None or (limited and limit < size.largest) or (free is not None and free < more * size.whole):
        size = _size(config, root, trained_parameters)  # which imports what builds the network, for seconds
    if size is None:
        return None
    if limited and limit < size.largest:
        raise ConfigError(
            "runs_dir",
            f"a checkpoint of {run_dir} has a file of {size_text(size.largest)}, and no file may exceed "
            f"{size_text(limit)} (ulimit -f); raise that limit",
        )
    if free is None:
        return None
    if free < size.whole:
        raise ConfigError(
            "runs_dir",
            f"a checkpoint of {run_dir} needs {size_text(size.whole)}, its disk has {size_text(free)} free, "
            f"{size_text(size.whole - free)} are missing; make room, or choose another",
        )
    if free < more * size.whole:
        return (
            f"warning: the disk of {run_dir} has {size_text(free)} free, room for {free // size.whole} more "
            f"checkpoint{'s' * (free >= 2 * size.whole)} of {size_text(size.whole)}, and {keys} lead to {more} more; "
            "make room, or lower them"
        )
    return None


def _free(root: Path) -> int | None:
    """Return the free bytes of the disk, and those that half-written checkpoints take; None where nobody knows."""
    free = free_bytes(root)
    left = (file for hidden in root.glob(f"{HIDDEN}*") for file in hidden.rglob("*") if file.is_file())
    return None if free is None else free + sum(file.stat().st_size for file in left)


def _to_come(config: RunConfig, root: Path) -> tuple[int, str]:
    """Return how many checkpoints are still to be written, and the one that is gone on from."""
    last, every, resume = config.total, config.checkpoint.every, config.checkpoint.resume
    start = 0
    if resume != "never":
        try:
            newest = checkpoint.latest(root)
        except CheckpointError:
            return 0, resume  # which is refused for that
        start = 0 if newest is None else checkpoint.step_of(newest)
        start = int(resume.removeprefix("step_")) if resume.startswith("step_") else start
    return max(0, -(-last // every) - start // every) if start < last else 0, resume


def _kept(config: RunConfig) -> tuple[int, str]:
    kept = config.checkpoint
    best = f" and keep_best={kept.keep_best}" if kept.keep_best or config.command == "align" else ""
    return kept.keep_last + kept.keep_best, f"keep_last={kept.keep_last}{best}"


def _size(config: RunConfig, root: Path, count: Callable[[ModelConfig], int | None]) -> Size | None:
    """Return the size of a checkpoint as the newest one is, else of the numbers that ``count`` says are learned."""
    for path in reversed(manifests(root)):
        sizes = [file["bytes"] for file in manifest_of(path)["files"].values()]
        return Size(on_disk(sizes) + SPARE, max(sizes))
    trained = count(config.model)
    return None if trained is None else checkpoint_size(config, trained)
