"""Patience: the time that work may take before whoever does it counts as frozen, by what it took before.

Free of Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta

from flowalign.config.cluster import PatienceConfig

LONGEST_STEP_S = 5.0


class AwakeClock:
    """Seconds in which this process itself was running: a whole job may be suspended, and then nobody is late.

    To be read often; of a longer pause ``LONGEST_STEP_S`` count.
    """

    def __init__(self, time_s: Callable[[], float] = time.monotonic) -> None:
        self._time_s, self._seen, self._passed = time_s, time_s(), 0.0

    def __call__(self) -> float:
        now = self._time_s()
        self._passed += min(now - self._seen, LONGEST_STEP_S)
        self._seen = now
        return self._passed


class Patience:
    """The time that every kind of work may take: ``first_s`` where none of it was done yet, then ``factor`` times the
    longest so far, and ``least_s`` at least. ``longest`` is by kind."""

    def __init__(self, config: PatienceConfig, longest: Mapping[str, float] | None = None) -> None:
        self._config = config
        self.longest = dict(longest or {})

    def limit_s(self, work: str) -> float:
        longest = self.longest.get(work)
        if longest is None:
            return self._config.first_s
        return max(self._config.least_s, self._config.factor * longest)

    def took(self, work: str, seconds: float) -> None:
        self.longest[work] = max(seconds, self.longest.get(work, 0.0))

    def before(self, work: str) -> str:
        """Say what it took so far, in words."""
        longest = self.longest.get(work)
        return "the first of its kind" if longest is None else f"at most {longest:.2g} s before"


class Wait:
    """An answer that is waited for: ``slow`` is true once, at half its time, and ``late`` from its end on."""

    def __init__(self, patience: Patience, clock: AwakeClock, work: str) -> None:
        self._patience, self._clock, self.work = patience, clock, work
        self.again()

    def again(self) -> None:
        """Let its time begin anew."""
        self._began, self._slow = self._clock(), False

    @property
    def waited_s(self) -> float:
        return self._clock() - self._began

    @property
    def limit_s(self) -> float:
        return self._patience.limit_s(self.work)

    @property
    def late(self) -> bool:
        return self.waited_s >= self.limit_s

    def became_slow(self) -> bool:
        if self._slow or self.waited_s < self.limit_s / 2:
            return False
        self._slow = True
        return True

    def answered(self, seconds: float = 0.0) -> None:
        """Note an answer; ``seconds`` are what the worker itself says that it took."""
        self._patience.took(self.work, max(seconds, self.waited_s))

    def so_far(self) -> str:
        return f"has not answered for {self.waited_s:.0f} s ({self.work}, {self._patience.before(self.work)})"

    def end(self) -> str:
        """Return the time of day at which it is late."""
        left = timedelta(seconds=max(0.0, self.limit_s - self.waited_s))
        return (datetime.now() + left).strftime("%H:%M:%S")

    def why(self) -> str:
        """Return the half a sentence about somebody who was late."""
        return f"it did not answer for {self.waited_s:.0f} s ({self.work}, {self._patience.before(self.work)})"
