"""Causes of a process's death: what can be read of its end, and no guess where nothing can. Free of Ray.

A worker says at its birth where its log lies and how often the kernel had run out of memory until then. Whoever waits
for it on the same machine keeps a file descriptor of the process, which knows the exit status after its end even though
Ray, whose child it was, throws that away (Linux 6.15; older kernels do not tell).
"""

from __future__ import annotations

import os
import re
import select
import signal
import struct
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rewards.printable import printable

_PIDFD_GET_INFO, _PIDFD_INFO_EXIT, _PIDFD_INFO = 0xC040FF0B, 1 << 3, "QQ12i"
_GONE_S = 2.0  # Ray may hear of a broken connection a moment before the process is gone
_READ_BYTES, _LINES, _WIDTH = 16384, 3, 160
_NOISE = re.compile(r"^:(job_id|actor_name|task_name):|^\[\d{4}-\d\d-\d\d |%\||^Extension modules:|^\*\*\* |^PC: |^@ ")
_RAYS = re.compile(r"site-packages/ray/")
_SIGNALS = {"Segmentation fault": "SIGSEGV", "Aborted": "SIGABRT", "Bus error": "SIGBUS"}
_SIGNALS |= {"Floating-point exception": "SIGFPE", "Illegal instruction": "SIGILL"}


@dataclass(frozen=True)
class Birth:
    """Facts that a process states while it lives.

    ``kills`` is a counter of the kernel's OOM killer, as ``(file, count)``.
    """

    pid: int
    node: str = ""
    log: str = ""
    kills: tuple[str, int] | None = None

    @classmethod
    def of_this_process(cls, node: str) -> Birth:
        return cls(os.getpid(), node, _standard_error(), oom_kills())


@dataclass(frozen=True)
class Ending:
    """The end of a process: ``said`` is half a sentence about it, ``kind`` is equal for two that ended alike."""

    kind: str
    said: str

    def __str__(self) -> str:
        return self.said


def say_hard_exits() -> None:
    """Let ``os._exit``, after which nothing is left, first write to the log who called it; may be called twice."""
    leave, own = os._exit, os.getpid()
    if leave.__module__ == __name__:
        return

    def exit_(status: int) -> None:
        if os.getpid() == own:
            caller = sys._getframe(1)
            where = printable(f"{caller.f_code.co_filename}, line {caller.f_lineno}")
            sys.stderr.write(f"os._exit({status}) at {where}\n")
            sys.stderr.flush()
        leave(status)

    os._exit = exit_  # type: ignore[assignment]


class Watch:
    """Keeps hold of a process of this machine, so that its exit status can be asked after its end."""

    def __init__(self, pid: int) -> None:
        try:
            self._fd: int | None = os.pidfd_open(pid)
        except (AttributeError, OSError):
            self._fd = None

    def status(self) -> int | None:
        """Return the wait status of the process; None where it lives, or where the kernel does not tell."""
        import fcntl

        if self._fd is None or not select.select([self._fd], [], [], _GONE_S)[0]:
            return None
        info = bytearray(struct.pack(_PIDFD_INFO, _PIDFD_INFO_EXIT, *[0] * 13))
        try:
            fcntl.ioctl(self._fd, _PIDFD_GET_INFO, info)
        except OSError:
            return None
        known, *_, status = struct.unpack(_PIDFD_INFO, info)
        return status if known & _PIDFD_INFO_EXIT else None

    def gone(self, within_s: float) -> bool:
        """Wait until the process has ended, for so long at most; True where nobody has hold of it."""
        return self._fd is None or bool(select.select([self._fd], [], [], within_s)[0])

    def kill(self) -> bool:
        """End it, a stopped process too, never another one that has got its number since; False where it is gone."""
        if self._fd is None or select.select([self._fd], [], [], 0)[0]:
            return False
        with suppress(OSError):
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)
        return True

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def ending(birth: Birth, status: int | None, said: str = "") -> Ending:
    """Say how the process ended.

    ``said`` is what Ray says of it. Reads the files of this machine.
    """
    lines = _log_lines(birth.log)
    memory, monitor = _memory(birth), _of_monitor(said)
    how = monitor or _of_status(status) or _of_ray(said) or _of_log(lines)
    kind = "want of memory" if memory or monitor else how or "gone at once"
    if how is None and memory is None:
        how = "its process was gone at once, without a message or a signal that it could catch, as after kill -9"
    shown = _that_matter(lines)
    return Ending(kind, "; ".join(filter(None, [how, memory, shown and f"its log ends: {shown}"])))


def ends_within(pid: int, within_s: float) -> bool:
    """Wait until a process of this machine has ended, for so long at most; tell whether it has."""
    until = time.monotonic() + within_s
    while (there := _state(pid)) not in ("", "Z", "X") and time.monotonic() < until:
        time.sleep(0.1)
    return there in ("", "Z", "X")


def is_stopped(pid: int) -> bool:
    """Tell whether a process of this machine is stopped, as by SIGSTOP or a debugger."""
    return _state(pid) in ("T", "t")


def _state(pid: int) -> str:
    """Return the letter by which the kernel tells a process's state; nothing where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0]


def oom_kills() -> tuple[str, int] | None:
    """Return the kernel's counter of processes that it killed for want of memory in this process's cgroup (v2 or
    v1)."""
    for file in _counters():
        count = _count(file)
        if count is not None:
            return str(file), count
    return None


def _counters() -> Iterable[Path]:
    root = Path("/sys/fs/cgroup")
    try:
        rows = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _, kinds, path in (row.split(":", 2) for row in rows if row.count(":") >= 2):
        inside = path.lstrip("/")
        if kinds == "":
            yield from (base / "memory.events" for base in (root / inside, root))
        elif "memory" in kinds.split(","):
            yield from (base / "memory.oom_control" for base in (root / "memory" / inside, root / "memory"))


def _count(file: Path) -> int | None:
    try:
        found = re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def _memory(birth: Birth) -> str | None:
    """Return the finding about the kernel's OOM killer: its own log names the process, or its counter went up."""
    named = _kernel_says(birth.pid)
    if named:
        return f"the kernel killed it for want of memory ({named})"
    if birth.kills is None:
        return None
    file, before = birth.kills
    now = _count(Path(file))
    if now is None or now <= before:
        return None
    return f"the kernel's OOM killer has struck in its memory cgroup ({file}: oom_kill {before} before, {now} now)"


def _kernel_says(pid: int) -> str | None:
    """Return the line of the kernel's log about a killed process of Ray, where that log may be read."""
    found = None
    try:
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        while True:
            try:
                text = os.read(log, 8192).decode(errors="replace")
            except BrokenPipeError:  # records were overwritten meanwhile
                continue
            if re.search(rf"Killed process {pid} \(ray::", text):
                found = text.partition(";")[2].splitlines()[0][:_WIDTH]
    except OSError:
        return found
    finally:
        os.close(log)


def _of_status(status: int | None) -> str | None:
    if status is None:
        return None
    if os.WIFSIGNALED(status):
        return f"it was killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"it ended with exit code {os.WEXITSTATUS(status)}"


def _of_monitor(said: str) -> str | None:
    if "running low on memory" in said:
        used = re.search(r"Memory on the node[^\n]*? was ([^\n]*? limit)", said)
        return f"Ray's memory monitor killed it: {used[1] if used else 'the node ran low on memory'}"
    return None


def _of_ray(said: str) -> str | None:
    if "SIGTERM" in said:
        return "it was killed by SIGTERM"
    code = re.search(r"with an exit code (\d+)", said)
    if code:
        return f"it ended with exit code {code[1]}"
    if re.search(r"\bnode (has )?died|node was terminated|node .* is dead", said, re.IGNORECASE):
        return "its node is gone"
    return None


def _of_log(lines: list[str]) -> str | None:
    for line in reversed(lines):
        fatal = re.match(r"Fatal Python error: (.+)", line)
        if fatal:
            name = _SIGNALS.get(fatal[1])
            return f"it was killed by {name}" if name else f"Python ended it: {fatal[1]}"
        left = re.match(r"os\._exit\((\d+)\) at ", line)
        if left:
            return f"it ended with exit code {left[1]}"
    return None


def _standard_error() -> str:
    """Return the file where this process's errors go, if that is a file."""
    try:
        name = os.readlink("/proc/self/fd/2")
    except OSError:
        return ""
    return name if os.path.isfile(name) else ""


def _log_lines(log: str) -> list[str]:
    """Return the last lines of a log; of its neighbour ``.out`` where it holds nothing of its own."""
    for name in (log, re.sub(r"\.err$", ".out", log)) if log else ():
        try:
            with open(name, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _READ_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            continue
        lines = [line.strip() for line in text.splitlines()]
        lines = [line for line in lines if line and not _NOISE.search(line)]
        if lines:
            return lines
    return []


def _that_matter(lines: list[str]) -> str:
    """Return the lines that matter: of a crash its first line and the frame that is not Ray's, else the last lines."""
    fatal = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python error")), None)
    if fatal is not None:
        frames = [line for line in lines[fatal:] if line.startswith("File ") and not _RAYS.search(line)]
        lines = [lines[fatal], *frames[: _LINES - 1]]
    return " | ".join(line[:_WIDTH] for line in lines[-_LINES:])
