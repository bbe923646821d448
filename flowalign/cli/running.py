"""Begin and end of the commands that run for hours: they hold the run directory, hear signals, explain the end."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import typer
from rich.console import Console

from flowalign.cli.exits import ExitCode, RunFailed
from flowalign.cli.terminal import console as make_console
from flowalign.cli.terminal import lasting_output, print_json, say_error, sentence
from flowalign.config.run import RunConfig
from flowalign.record.disk import DiskError
from flowalign.record.lock import RunLock
from flowalign.record.progress import Phases
from flowalign.record.stop import EndedAtOnce, EndedEarly, StopRequest
from flowalign.run.advice import further_back, gentler, kept, last_checkpoint, lost_at_once


@contextmanager
def conduct(as_json: bool, phases: Phases) -> Iterator[StopRequest]:
    """Hear signals inside as requests for an early end.

    Where that end comes, say so, say where everything lies, and exit with code 75.
    """
    alone, first = os.environ.get("WORLD_SIZE", "1") == "1", os.environ.get("RANK", "0") == "0"
    with StopRequest(alone=alone).on_signals() as stop, lasting_output():
        try:
            yield stop
        except EndedEarly as early:
            if first:
                console = make_console(as_json)
                console.print(str(early) or "stopped before anything was begun")
                if early.run_dir is not None:
                    say_end(console, phases, lying(early.run_dir))
                print_json(as_json, {"ended": "early", "run": early.run_dir, "checkpoint": early.checkpoint})
            raise typer.Exit(ExitCode.EARLY) from None


def lying(run_dir: Path) -> dict[str, Path]:
    """Return the things that a run has left, by the word for each; leave out a run directory that was removed again."""
    last, report = last_checkpoint(run_dir), run_dir / "report.html"
    named = {"run": run_dir, "checkpoint": last, "report": report, "metrics": run_dir / "metrics.jsonl"}
    return {what: path for what, path in named.items() if path is not None and path.exists()}


def say_end(console: Console, phases: Phases, said: Mapping[str, Path | str]) -> None:
    """Say where everything lies, a line each, and how long the run took."""
    for what, value in said.items():
        console.print(f"{what}: {value}")
    console.print(f"took: {phases}")


@contextmanager
def held(
    config: RunConfig,
    run_dir: Path,
    stop: StopRequest,
    console: Console,
    take_over: bool,
) -> Iterator[RunLock]:
    """Hold ``run_dir``, the directory of ``config``, which `flowalign.intake.ready` has looked at.

    Raises:
        RunDirectoryError, DiskError: it cannot be taken; nothing in it was changed.
        RunFailed: what is done inside failed after it had begun.
    """
    began_from = last_checkpoint(run_dir)
    resumes = config.checkpoint.resume != "never"
    with ExitStack() as stack:
        with stop.deferred():
            lock = stack.enter_context(RunLock.take(run_dir, take_over=take_over))
            stack.enter_context(stop.watching(lock))
        stop.last_words = partial(lost_at_once, run_dir, stop, resumes)
        if lock.said:
            console.print(lock.said)
        try:
            yield lock
        except KeyboardInterrupt as interrupt:
            if stop.at_once:
                raise EndedAtOnce(lost_at_once(run_dir, stop, resumes)) from None
            raise _ended_early(interrupt, run_dir, stop, resumes) from None
        except Exception as error:
            if stop.at_once:  # it came in the midst of a library's call, which made another error of it
                raise EndedAtOnce(lost_at_once(run_dir, stop, resumes)) from error
            if lock.begun:
                raise _failed(error, config, run_dir, began_from, resumes) from error
            if isinstance(error, DiskError):
                error.begun = False
            raise


def _ended_early(interrupt: KeyboardInterrupt, run_dir: Path, stop: StopRequest, resumes: bool) -> EndedEarly:
    """Say where the run goes on; what was raised as EndedEarly in Ray's own code comes out as its base class."""
    early = interrupt if isinstance(interrupt, EndedEarly) else EndedEarly()
    early.run_dir, early.checkpoint = run_dir, last_checkpoint(run_dir)
    goes_on = "the same command continues it from" if resumes else "its last checkpoint is"
    where = f"; {goes_on} {early.checkpoint}" if early.checkpoint else " before the first iteration"
    early.args = (f"stopped{where}",)
    return early


def _failed(error: Exception, config: RunConfig, run_dir: Path, began_from: Path | None, resumes: bool) -> RunFailed:
    """Say what a run that failed has kept, and how to go on where its learning rate was too large."""
    last = last_checkpoint(run_dir)
    said = gentler(error, config, run_dir, last)
    return RunFailed(kept(last, resumes) if said is None else said + further_back(last, began_from), error)


@contextmanager
def following(stop: StopRequest) -> Iterator[None]:
    """End this process where another one of its run fails, with the same code.

    What that one says is repeated once on each other host.
    """
    from flowalign.engine.process_group import OtherRankFailed

    try:
        yield
    except OtherRankFailed as error:
        code = ExitCode.FAILED if stop.begun else ExitCode.REFUSED
        if os.environ.get("LOCAL_RANK", "0") == "0":
            say_error(sentence(error) or str(error))
        raise typer.Exit(code) from None
