"""The turn of several servers: each is asked in its turn, without those that keep failing (a circuit breaker)."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Address = TypeVar("Address")


@dataclass(eq=False)
class Replica(Generic[Address]):
    """A server and how it did lately: failures in a row, until when it is left out, until when it asked to be left
    alone, its last failure."""

    address: Address
    failures: int = 0
    out_until: float = float("-inf")
    busy_until: float = float("-inf")
    cause: str = ""


class Replicas(Generic[Address]):
    """The servers of one kind, shared by threads.

    One that failed ``breaker_failures`` times in a row is left out for ``breaker_reset_s`` seconds and then gets a
    single request as a trial: an answer brings it back, a failure leaves it out again. One that asked to be left alone
    is, until then. Where all would be left out those are asked that did not ask for it, or else all. ``clock`` tells
    seconds.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        *,
        breaker_failures: int = 3,
        breaker_reset_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.all = [Replica(address) for address in addresses]
        self._failures, self._reset_s, self._clock = breaker_failures, breaker_reset_s, clock
        self._turn = random.randrange(len(self.all))  # clients that start together shall not all begin with the first
        self._lock = threading.Lock()

    def round(self) -> Iterator[tuple[Replica[Address], int]]:
        """Yield the servers to ask, each once, until one answers.

        Each comes with how many are still to be asked, this one included.
        """
        tried: list[Replica[Address]] = []
        while choice := self._choice(tried):
            tried.append(choice[0])
            yield choice[0], len(choice)

    def _choice(self, tried: Collection[Replica[Address]]) -> list[Replica[Address]]:
        """Return the servers left to ask, in turn; the first of them is taken."""
        with self._lock:
            now = self._clock()
            busy = [replica for replica in self.all if now < replica.busy_until]
            out = [replica for replica in self.all if replica in busy or now < replica.out_until]
            if len(out) == len(self.all):
                out = busy if len(busy) < len(self.all) else []
            in_turn = self.all[self._turn :] + self.all[: self._turn]
            left = [replica for replica in in_turn if replica not in tried and replica not in out]
            if left:
                self._turn = (self.all.index(left[0]) + 1) % len(self.all)
                if left[0].failures >= self._failures:
                    left[0].out_until = now + self._reset_s  # while its trial runs, nobody else waits for it
            return left

    def answered(self, replica: Replica[Address]) -> None:
        with self._lock:
            replica.failures, replica.cause = 0, ""
            replica.out_until = replica.busy_until = float("-inf")

    def busy_s(self) -> float:
        """Return the seconds until the first may be asked that asked to be left alone.

        It is 0 where there is one that did not.
        """
        with self._lock:
            return max(0.0, min(replica.busy_until for replica in self.all) - self._clock())

    def failed(self, replica: Replica[Address], cause: str, *, busy_s: float = 0.0) -> None:
        """Count a failure; the server asked to be left alone for ``busy_s``."""
        with self._lock:
            replica.busy_until = self._clock() + busy_s
            replica.failures += 1
            replica.cause = cause
            if replica.failures >= self._failures:
                replica.out_until = self._clock() + self._reset_s
