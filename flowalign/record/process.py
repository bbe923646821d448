"""A process as another may recognise it later, in spite of reused numbers, restarted machines and containers."""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_SPACE = Path("/proc/self/ns/pid")


@dataclass(frozen=True)
class Process:
    """A number means something within one boot of one machine and one space of process numbers only.

    ``started`` is in the system's own unit: a number that was given again began at another time.
    """

    host: str
    boot: str
    space: str
    pid: int
    started: str

    @classmethod
    def this(cls) -> Process:
        return cls(socket.gethostname(), _boot(), _space(), os.getpid(), _started(os.getpid()) or "")

    def lives(self) -> bool | None:
        """Tell whether it still runs; None where this process has no way to know.

        Containers and machines may share a name, so the name alone lets nobody judge by the number.
        """
        me = Process.this()
        if (self.host, self.boot, self.space) != (me.host, me.boot, me.space):
            return None
        started = _started(self.pid)
        if started is not None:
            return started == self.started
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            return None  # it is there, and the system shows nothing of it
        return None


def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def _space() -> str:
    try:
        return os.readlink(_SPACE)
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Return the time when a process began.

    It is None where it cannot be seen. One that ended and was not waited for is ``ended``.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None if _boot() else _started_by_ps(pid)
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return "ended" if fields[0] in "ZX" else fields[19]


def _started_by_ps(pid: int) -> str | None:
    """Return the time when a process began, on systems without /proc."""
    try:
        done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
