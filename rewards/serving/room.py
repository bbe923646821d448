"""Room for the bytes of requests that a server holds at once, and who waits or goes where there are too many.

What finds no room waits, unread, smallest first. A body that comes slower than `PACE` is put out where others wait for
its room: its sender may try again, and one that sends nothing more keeps nobody out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from rewards.interface import ScorerError

PACE = 256 * 1024  # bytes a second
TICK_S = 0.1
SLOW_TICKS = 5


class Crowded(ScorerError):
    """No room for this request now; a later try may find some."""

    kind = "overloaded"


class TooSlow(ScorerError):
    """A body that was not there in time."""

    kind = "too_slow"


@dataclass(eq=False)
class Stay:
    """The room that one request has; ``received`` is how much of its body came."""

    size: int
    received: int = 0
    seen: int = 0
    slow_ticks: int = 0
    gone: bool = False
    until: asyncio.Timeout | None = None

    def go(self) -> None:
        """End the reading of the body."""
        assert self.until is not None
        self.gone = True
        if not self.until.expired():
            self.until.reschedule(asyncio.get_running_loop().time())


@dataclass(eq=False)
class _Waiter:
    size: int
    granted: asyncio.Future[None]


class Room:
    """Space for ``limit`` bytes, of one event loop; ``what`` names them in errors. A wait lasts ``wait_s`` at most."""

    def __init__(self, limit: int, what: str, *, wait_s: float) -> None:
        self.limit, self.what, self.wait_s = limit, what, wait_s
        self.held = 0
        self._waiters: list[_Waiter] = []
        self._reading: list[Stay] = []
        self._ticking: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def taken(self, size: int) -> AsyncIterator[Stay]:
        """Take room for ``size`` bytes, as soon as there is some; one that is larger than all gets all.

        Raises:
            Crowded: there was none in time.
        """
        stay = Stay(min(size, self.limit))
        await self._enter(stay.size)
        try:
            yield stay
        finally:
            self._leave(stay.size)

    @asynccontextmanager
    async def reading(self, stay: Stay, seconds: float) -> AsyncIterator[None]:
        """Limit the time in which the body of ``stay`` has to come.

        Raises:
            TooSlow: it did not. Crowded: it came so slowly that others had its room.
        """
        self._reading.append(stay)
        self._ticking = self._ticking or asyncio.get_running_loop().call_later(TICK_S, self._tick)
        try:
            async with asyncio.timeout(seconds) as stay.until:
                yield
        except TimeoutError:
            if stay.gone:
                raise self._crowded() from None
            raise TooSlow(f"the body was not there within {seconds:g} s; send smaller batches") from None
        finally:
            self._reading.remove(stay)

    def give_way(self) -> bool:
        """End the slowest body, or else the largest request that waits; False where there is neither."""
        if slow := self._slow():
            slow[0].go()
            return True
        waiting = [waiter for waiter in self._waiters if not waiter.granted.done()]
        if waiting:
            max(waiting, key=lambda waiter: waiter.size).granted.set_exception(self._crowded())
        return bool(waiting)

    async def _enter(self, size: int) -> None:
        waiter = _Waiter(size, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        self._settle()
        try:
            async with asyncio.timeout(self.wait_s):
                await waiter.granted
        except BaseException as error:
            if waiter.granted.done() and not waiter.granted.cancelled() and waiter.granted.exception() is None:
                self._leave(size)  # granted in the moment in which the wait ended
            if isinstance(error, TimeoutError):
                raise self._crowded() from None
            raise
        finally:
            self._waiters = [other for other in self._waiters if other is not waiter]

    def _leave(self, size: int) -> None:
        self.held -= size
        self._settle()

    def _crowded(self) -> Crowded:
        return Crowded(f"{self.held >> 20} MiB of {self.what} are held, limit {self.limit >> 20}; send again later")

    def _settle(self) -> None:
        """Let in who has room, smallest first; where the next has none, put out slow bodies if they make enough."""
        self._waiters = [waiter for waiter in self._waiters if not waiter.granted.done()]
        for waiter in sorted(self._waiters, key=lambda waiter: waiter.size):
            if self.held + waiter.size > self.limit:
                missing = self.held + waiter.size - self.limit
                self._make_room(missing - sum(stay.size for stay in self._reading if stay.gone))
                return
            self.held += waiter.size
            waiter.granted.set_result(None)

    def _make_room(self, missing: int) -> None:
        slow = self._slow()
        if sum(stay.size for stay in slow) < missing:
            return
        for stay in slow:
            if missing <= 0:
                return
            stay.go()
            missing -= stay.size

    def _slow(self) -> list[Stay]:
        """Return the bodies that may be put out, the slowest first."""
        found = [stay for stay in self._reading if stay.slow_ticks >= SLOW_TICKS and not stay.gone]
        return sorted(found, key=lambda stay: -stay.slow_ticks)

    def _tick(self) -> None:
        # Counted in turns of the loop: where the loop itself was late, that is one turn and nobody is slow for it.
        for stay in self._reading:
            stay.slow_ticks = 0 if stay.received - stay.seen >= PACE * TICK_S else stay.slow_ticks + 1
            stay.seen = stay.received
        self._ticking = asyncio.get_running_loop().call_later(TICK_S, self._tick) if self._reading else None
        self._settle()
