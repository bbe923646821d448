"""Waits for Ray's answers in short steps, and meanwhile looks whether Ray itself is there and who is late."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum, auto
from typing import Any

import ray

from flowalign.config.cluster import PatienceConfig
from flowalign.run.patience import AwakeClock, Patience, Wait

STEP_S = 1.0


class Came(Enum):
    """The news of an answer: it is there, half of its time is over, or all of it."""

    ANSWER = auto()
    SLOW = auto()
    LATE = auto()


class Vigil:
    """``check`` raises where Ray is gone; ``say`` is told of who is late."""

    def __init__(
        self,
        config: PatienceConfig,
        check: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._check, self.say = check, say
        self.clock, self.patience = AwakeClock(), Patience(config)

    def wait(self, work: str) -> Wait:
        """Begin to wait for an answer that was just asked for."""
        return Wait(self.patience, self.clock, work)

    def step(self, refs: Sequence[Any]) -> list[Any]:
        """Return the first of ``refs`` that is there, or nothing after ``STEP_S``.

        Raises:
            ClusterLost: Ray is gone.
        """
        self._check()
        self.clock()
        return ray.wait(list(refs), num_returns=1, timeout=STEP_S)[0]

    def each(self, waits: Mapping[Any, Wait]) -> Iterator[tuple[Any, Came]]:
        """Yield every ref once with its ANSWER, and before it SLOW and LATE.

        The caller ends what is late, or gives it time.

        Waits may be shared by several refs, which then are slow and late together, and are told of once.
        """
        pending = dict(waits)
        while pending:
            for ref in self.step(list(pending)):
                del pending[ref]
                yield ref, Came.ANSWER
            told: set[int] = set()
            for ref, wait in list(pending.items()):
                if ref not in pending or id(wait) in told:
                    continue
                told.add(id(wait))
                if wait.became_slow():
                    yield ref, Came.SLOW
                if wait.late:
                    yield ref, Came.LATE
