"""Advice at the end of a run: what it has kept or lost, and the command that goes on from there."""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowalign.config.run import RunConfig
from flowalign.record.stop import StopRequest

LARGE = 1e-4  # what is tried where the learning rate was above 1


def kept(last: Path | None, resumes: bool) -> str:
    """Say what a run that failed has kept."""
    if last is None:
        return f"there is no checkpoint yet{', and the same command begins anew' if resumes else ''}"
    return f"the last checkpoint is {last}{'; the same command continues from it' if resumes else ''}"


def lost_at_once(run_dir: Path, stop: StopRequest, resumes: bool) -> str:
    """Say what a second Ctrl-C cost, and what is left."""
    last = last_checkpoint(run_dir)
    saved = 0 if last is None else int(last.name.removeprefix("step_"))
    lost = max(0, stop.done - saved) if stop.done else 0
    what = f"{lost} finished iteration{'s' * (lost != 1)} {'is' if lost == 1 else 'are'} lost"
    if last is None:
        return f"stopped at once, before the first checkpoint; {what}"
    goes_on = "the same command continues it from" if resumes else "its last checkpoint is"
    return f"stopped at once; {goes_on} {last}, and {what}"


def gentler(error: Exception, config: RunConfig, run_dir: Path, last: Path | None) -> str | None:
    """Say how to go on with a smaller learning rate, where ``error`` says that this one was too large."""
    from flowalign.engine.base import NonFiniteUpdate
    from flowalign.record.destroyed import DestroyedState

    if not isinstance(error, DestroyedState | NonFiniteUpdate):
        return None
    rates = smaller_rates(config)
    words = ["flowalign", config.command, str(run_dir / "config.yaml")]
    words += [f"{key}={rate:g}" for key, rate in rates.items()]
    if last is None:
        return f"there is no checkpoint yet; begin with a smaller learning rate: {shlex.join(words)}"
    words += ["checkpoint.resume=auto"] * (config.checkpoint.resume == "never")
    words += [word for key in rates for word in ("--accept-changed", key)]
    return f"the last good checkpoint is {last}; go on from it with a smaller learning rate: {shlex.join(words)}"


def further_back(last: Path | None, began_from: Path | None) -> str:
    """Name what else to go on from, where this start has written no checkpoint: the one it read may be at fault."""
    if last is None or last != began_from:
        return ""
    from flowalign.record.manifest import going_on

    command = going_on(last.parent.parent, without=last)
    return "" if command is None else f"; where that ends alike, its own state is at fault: {command}"


def smaller_rates(config: RunConfig) -> dict[str, float]:
    """Return smaller learning rates for a run, by their keys; where one ends only if that is above the smaller one."""
    sections: dict[str, Any] = {f"phases.{i}": phase for i, phase in enumerate(getattr(config, "phases", ()))}
    sections = sections or {"learner.optimizer": config.learner.optimizer}
    smaller: dict[str, float] = {}
    for at, held in sections.items():
        rate, final = held.learning_rate, held.final_learning_rate
        tried = min(rate / 10, LARGE) if rate > 1 else rate / 10
        smaller |= {f"{at}.learning_rate": tried} if rate else {}
        smaller |= {f"{at}.final_learning_rate": tried} if final > tried else {}
    return smaller


def last_checkpoint(run_dir: Path) -> Path | None:
    """Return the checkpoint that a run would go on from; None where there is none."""
    from flowalign.record.checkpoint import CheckpointError, latest

    with suppress(CheckpointError):
        return latest(run_dir / "checkpoints")
    return None
