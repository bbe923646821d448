"""Looks, from a thread of its own, whether a run's own Ray is stopped or does not come to its end, and then kills it:
who waits for it in a call of Ray's hears of nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

from flowalign.cluster import guardian
from flowalign.record.death import is_stopped
from flowalign.run.patience import AwakeClock

_LOOK_S = 0.5
END_S = 10.0


class Lookout:
    """Watches ``processes`` of the Ray in ``folder``; when one has been stopped for ``patience_s``, that Ray is killed.

    ``lost`` says then who was stopped.
    """

    def __init__(self, folder: str, processes: Mapping[str, Any], patience_s: float) -> None:
        self._folder, self._processes, self._patience_s = folder, dict(processes), patience_s
        self._clock, self._over = AwakeClock(), threading.Event()
        self._since: float | None = None
        self._ends_at: float | None = None
        self.lost: str | None = None
        threading.Thread(target=self._look, daemon=True, name="lookout").start()

    def stopped(self) -> str | None:
        """Return who of them is stopped at this moment, as by SIGSTOP."""
        names = [
            f"{name} (process {process.pid})" for name, process in self._processes.items() if is_stopped(process.pid)
        ]
        return " and ".join(names) or None

    def wait(self, say: Callable[[str], None]) -> None:
        """Return when nobody is stopped, or Ray is lost; ``say`` is told after half of the patience."""
        began, said = time.monotonic(), False
        while self.lost is None and (who := self.stopped()) is not None:
            waited = time.monotonic() - began
            if not said and waited > self._patience_s / 2:
                said, end = True, datetime.now() + timedelta(seconds=self._patience_s - waited)
                say(f"late: Ray's {who} is stopped; if it goes on so the run ends at {end:%H:%M:%S}")
            time.sleep(0.1)

    def begin_end(self) -> None:
        """Give Ray ``END_S`` from now on to come to its end."""
        if self._ends_at is None:
            self._ends_at = time.monotonic() + END_S

    def close(self) -> None:
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(_LOOK_S):
            now, who = self._clock(), self.stopped()
            self._since = None if who is None else now if self._since is None else self._since
            if self._since is not None and now - self._since >= self._patience_s:
                self.lost = f"Ray's {who} has been stopped for {now - self._since:.0f} s, and the workers wait for it"
            if self.lost is not None or (self._ends_at is not None and time.monotonic() > self._ends_at):
                guardian.end(self._folder)
                return
