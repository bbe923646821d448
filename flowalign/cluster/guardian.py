"""Ends what is left of a Ray that a run has started: called by the run at its end, or, as a process of its own that
outlives the run, once that is gone. Standard library alone, since the process must be small."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

END_S = 30.0
# Files that Ray's own processes, and what they have started, write to. A driver's are others.
_RAYS = re.compile(
    r"(raylet|gcs_server|monitor|log_monitor|dashboard|dashboard_agent|runtime_env_agent|worker-[0-9a-f]+-[0-9a-f]+-\d+)"
    r"\.(out|err|log)"
)


def start(folder: str) -> subprocess.Popen[bytes] | None:
    """Begin to watch this process for the sake of ``folder``; None where the system has no way to."""
    if not hasattr(os, "pidfd_open"):
        return None
    command = [sys.executable, "-I", "-S", os.path.abspath(__file__), str(os.getpid()), folder]
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, cwd="/", start_new_session=True)


def end(folder: str, end_s: float = END_S) -> list[int]:
    """Kill every process of the Ray whose directory is ``folder``, stopped ones too; answers with their numbers.

    They are known by what they write: Ray's own log files in that directory. Whoever only reads them is let alone.
    """
    found: list[int] = []
    until = time.monotonic() + end_s
    while (there := list(processes(folder))) and time.monotonic() < until:
        for pid in there:
            _kill(pid, folder)
        found += [pid for pid in there if pid not in found]
        time.sleep(0.05)
    return found


def processes(folder: str) -> Iterator[int]:
    root = os.path.realpath(folder) + os.sep
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdigit() and int(name) != os.getpid() and _writes(int(name), root):
            yield int(name)


def _kill(pid: int, folder: str) -> None:
    """Kill it if it still is one of them: its number may have been given to another meanwhile."""
    with suppress(OSError):
        descriptor = os.pidfd_open(pid)
        try:
            if _writes(pid, os.path.realpath(folder) + os.sep):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)


def _writes(pid: int, root: str) -> bool:
    """Tell whether a process has one of Ray's log files below ``root`` open for writing.

    Other users' processes show nothing.
    """
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for number in descriptors:
        with suppress(OSError):
            file = os.readlink(f"/proc/{pid}/fd/{number}").removesuffix(" (deleted)")
            if file.startswith(root) and _RAYS.fullmatch(os.path.basename(file)) and _for_writing(pid, number):
                return True
    return False


def _for_writing(pid: int, number: str) -> bool:
    with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii") as file:
        found = re.search(r"^flags:\s*([0-7]+)$", file.read(), re.MULTILINE)
    return found is not None and int(found[1], 8) & os.O_ACCMODE != os.O_RDONLY


def _outlive(pid: int, folder: str) -> None:
    with suppress(ProcessLookupError):
        watched = os.pidfd_open(pid)
        if os.getppid() == pid:  # else it is gone already
            select.select([watched], [], [])
    end(folder)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _outlive(int(sys.argv[1]), sys.argv[2])
