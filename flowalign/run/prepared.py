"""What a run begins with: the checkpoint that it goes on from, and its fixed parts. Nothing is started or written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flowalign.config.run import RunConfig
from flowalign.record import checkpoint
from flowalign.record.checkpoint import Checkpoint
from flowalign.run.fixed import build_run, lines_on_data
from flowalign.run.made import Accepted, MadeOf
from flowalign.run.protocols import Run
from flowalign.run.ranks import Rank
from flowalign.run.resume import refuse_older, resume_from
from flowalign.safety.collapse import stopped_by_alarm


@dataclass(frozen=True)
class Prepared:
    """A run that is about to start: what it goes on from, its fixed parts, and the files that it is made of.

    ``made`` is None in a process that does not hold the run directory.
    """

    saved: Checkpoint | None
    run: Run
    made: MadeOf | None

    @property
    def start(self) -> int:
        """The iterations that are done already."""
        return 0 if self.saved is None else self.saved.step

    def close(self) -> None:
        if self.made is not None:
            self.made.close()


def prepare(
    config: RunConfig,
    base_dir: Path,
    say: Callable[[str], object],
    *,
    accepted: Accepted | None = None,
    rank: Rank = Rank(),  # noqa: B008 - a value
    holds: bool = True,
) -> Prepared | None:
    """Return what the run begins with; None where it is finished, or was stopped by an alarm.

    ``holds`` tells that this process keeps the run directory, so that it compares what the run is made of with what
    that was.

    Raises:
        CheckpointError: there is nothing that it can go on from, though it was begun. ConfigError: what it is made of
            has changed since.
    """
    run_dir = Path(config.runs_dir) / config.name
    saved = _saved(config, run_dir, say, rank)
    if saved is not None and (done := saved.step) >= config.total:
        more = "add a phase to `phases`" if getattr(config, "phases", None) else "raise `iterations`"
        say(f"{run_dir} has done all {done} iterations already; {more} to continue")
        return None
    if saved is not None and stopped_by_alarm(run_dir, config.limits, saved.step) is not None:
        return None
    refuse_older(saved)
    made = MadeOf(config, base_dir, accepted) if holds else None
    try:
        if saved is not None and made is not None:
            made.refuse_changes(saved, say, small=True)
        run = build_run(config)
        say(f"run directory: {run_dir}" + ("" if saved else ", begun anew"))
        for line in lines_on_data(config, run):
            say(line)
    except BaseException:
        if made is not None:
            made.close()
        raise
    return Prepared(saved, run, made)


def _saved(config: RunConfig, run_dir: Path, say: Callable[[str], object], rank: Rank) -> Checkpoint | None:
    """Return the checkpoint that the first process goes on from.

    The others, which cannot ask it before their engines stand, look at it alone where a run may be finished: then
    none of them begins.

    Raises:
        CheckpointError: there is nothing that the run can go on from, though it was begun.
    """
    last = max(checkpoint.steps(run_dir / "checkpoints"), default=0)
    if rank.index and last < config.total:
        return None
    return resume_from(run_dir, config.checkpoint.resume, say)
