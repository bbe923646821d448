"""How the commands that run for hours begin and end: the run directory held, signals heard, the end explained."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import typer
from rich.console import Console

from flowalign.cli.exits import ExitCode, RunFailed
from flowalign.cli.terminal import console as make_console
from flowalign.cli.terminal import lasting_output, print_json
from flowalign.config import AlignConfig
from flowalign.pretrainconfig import PretrainConfig
from flowalign.record.lock import RunLock
from flowalign.record.stop import EndedEarly, StopRequest


@contextmanager
def conduct(as_json: bool, unit: str = "iteration") -> Iterator[StopRequest]:
    """Inside, signals ask for an early end; where that comes, it is said, and the exit code is 75."""
    alone, first = os.environ.get("WORLD_SIZE", "1") == "1", os.environ.get("RANK", "0") == "0"
    with StopRequest(unit, alone=alone).on_signals() as stop, lasting_output():
        try:
            yield stop
        except EndedEarly as early:
            if first:
                console = make_console(as_json)
                console.print(str(early) or "stopped before anything was begun")
                print_json(as_json, {"ended": "early", "run": early.run_dir, "checkpoint": early.checkpoint})
            raise typer.Exit(ExitCode.EARLY) from None


@contextmanager
def held(
    config: AlignConfig | PretrainConfig,
    stop: StopRequest,
    console: Console,
    take_over: bool,
    accepted: Sequence[str] = (),
) -> Iterator[RunLock]:
    """Hold the run directory of ``config``, which has been looked at first; see `check_run`.

    Raises:
        RunDirectoryError, ConfigError: it cannot be taken; nothing in it was changed.
        RunFailed: what is done inside failed after it had begun.
    """
    from flowalign.cli.runs import check_run

    run_dir = check_run(config, accepted)
    resumes = (config.resume if isinstance(config, PretrainConfig) else config.checkpoint.resume) != "never"
    with ExitStack() as stack:
        with stop.deferred():
            lock = stack.enter_context(RunLock.take(run_dir, take_over=take_over))
            stack.enter_context(stop.watching(lock))
        if lock.said:
            console.print(lock.said)
        try:
            yield lock
        except KeyboardInterrupt as interrupt:
            if stop.at_once:
                raise
            # What was raised as EndedEarly in Ray's own code comes out as its base class.
            early = interrupt if isinstance(interrupt, EndedEarly) else EndedEarly()
            early.run_dir, early.checkpoint = run_dir, _last_checkpoint(run_dir)
            goes_on = "the same command continues it from" if resumes else "its last checkpoint is"
            kept = f"; {goes_on} {early.checkpoint}" if early.checkpoint else f" before the first {stop.unit}"
            early.args = (f"stopped{kept}",)
            raise early from None
        except Exception as error:
            if not lock.begun:
                raise
            last = _last_checkpoint(run_dir)
            goes_on = "; the same command continues from it" if resumes else ""
            kept = f"the last checkpoint is {last}{goes_on}" if last else "there is no checkpoint yet"
            raise RunFailed(kept, error) from error


def _last_checkpoint(run_dir: Path) -> Path | None:
    from flowalign.checkpoint import CheckpointError, latest

    with suppress(CheckpointError):
        return latest(run_dir / "checkpoints")
    return None
