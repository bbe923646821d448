"""The processes of one run that torchrun has started, each of them a rank of the learner."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowalign.config.run import RunConfig
from flowalign.engine import process_group
from flowalign.record import checkpoint
from flowalign.record.stop import StopRequest
from flowalign.run.journal import RunJournal, due
from flowalign.run.protocols import Backend, Collected, Count


@dataclass(frozen=True)
class Rank:
    """This process among those that torchrun has started; alone where it has not."""

    index: int = 0
    world_size: int = 1
    local: int = 0
    host: str = "127.0.0.1"
    port: int = 0

    @classmethod
    def of_environment(cls) -> Rank:
        env = os.environ
        if "WORLD_SIZE" not in env:
            return cls()
        numbers = (int(env[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        one_host = env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]
        return cls(*numbers, host=cls.host if one_host else env["MASTER_ADDR"], port=int(env["MASTER_PORT"]))

    @property
    def alone(self) -> bool:
        return self.world_size == 1

    def device(self, configured: str) -> str:
        """Return this rank's device: one GPU a process."""
        return f"cuda:{self.local}" if configured == "cuda" and not self.alone else configured


class SharedJournal:
    """The journal of several ranks, which the first keeps: all of them fail where it does, and stop together.

    ``journal`` is None on the others. Every method is a collective call.
    """

    def __init__(self, config: RunConfig, journal: RunJournal | None, stop: StopRequest) -> None:
        self._config, self._journal, self._stop = config, journal, stop

    def doing(self, what: str, begun: int | None = None) -> Count:
        return (lambda done, total: None) if self._journal is None else self._journal.doing(what, begun)

    def begin(self) -> None:
        self._together(lambda journal: journal.begin())
        if self._journal is None:
            self._stop.begin()

    def iteration(self, iteration: int, metrics: dict[str, float], collected: Collected | None) -> None:
        self._stop.done = iteration
        self._together(lambda journal: journal.iteration(iteration, metrics, collected))

    def evaluation(self, iteration: int, collected: Collected, seconds: float) -> dict[str, float]:
        return self._together(lambda journal: journal.evaluation(iteration, collected, seconds)) or {}

    def checkpoint(self, iteration: int, backend: Backend, metrics: dict[str, float], drawn: Mapping[str, Any]) -> None:
        states = backend.state()
        self._together(lambda journal: journal.save(iteration, states, metrics, drawn))

    def due(self, what: str, iteration: int) -> bool:
        return due(self._config, what, iteration)

    @property
    def stopping(self) -> bool:
        return process_group.agreed(self._stop.asked if self._journal is None else self._journal.stopping)

    def _together(self, call: Callable[[RunJournal], Any]) -> Any:
        with process_group.failing_together():
            return None if self._journal is None else call(self._journal)


def same_on_all(run_dir: Path, rank: Rank, saved: checkpoint.Checkpoint | None) -> checkpoint.Checkpoint | None:
    """Return the checkpoint that the run goes on from: the first rank has found ``saved``, and all read the same.

    A collective call. Raise CheckpointError where it cannot be read.
    """
    step = process_group.largest(0 if saved is None else saved.step)
    with process_group.failing_together():
        return checkpoint.load(run_dir / "checkpoints" / f"step_{step:06d}") if rank.index and step else saved
