"""Processes that a reward starts: found while it works, ended when the run ends.

Found are children of this process, on Linux; those that left it on purpose, with a second fork, are not.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import time
from contextlib import suppress

GRACE_S = 1.0
_held: dict[int, int] = {}  # process ids, and file descriptors that know the process whoever takes its number later


class new_children:
    """The children that are there now; ``keep`` remembers those that came since."""

    def __init__(self) -> None:
        self._before = _children("self")

    def keep(self) -> None:
        for pid in _children("self") - self._before - set(_held):
            with suppress(OSError):
                _held[pid] = os.pidfd_open(pid)
        for pid in [pid for pid, held in _held.items() if select.select([held], [], [], 0)[0]]:
            os.close(_held.pop(pid))


def end_children() -> None:
    """End what `new_children` kept, and their own children: asked first, and after a second without asking."""
    for pid in list(_held):
        for below in _below(pid):
            with suppress(OSError):
                _held[below] = os.pidfd_open(below)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for held in _held.values():
            with suppress(OSError):
                signal.pidfd_send_signal(held, number)
        until = time.monotonic() + GRACE_S
        while _alive() and time.monotonic() < until:
            time.sleep(0.01)
    for pid in list(_held):
        os.close(_held.pop(pid))
        with suppress(OSError):
            os.waitpid(pid, os.WNOHANG)


atexit.register(end_children)


def _alive() -> bool:
    return any(not select.select([held], [], [], 0)[0] for held in _held.values())


def _below(pid: int) -> set[int]:
    found = _children(str(pid))
    return found.union(*map(_below, found))


def _children(process: str) -> set[int]:
    """Return the child processes; each belongs to the thread that started it."""
    found: set[int] = set()
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            with suppress(OSError), open(f"/proc/{process}/task/{thread}/children") as file:
                found.update(map(int, file.read().split()))
    return found
