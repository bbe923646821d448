"""The holder of a lock, as the lock names it, and whether that holder may still be at work."""

from __future__ import annotations

import json
import os
import re
import uuid
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from flowalign.record.process import Process

LOCK = "lock"
DEAD_AFTER_S = 300.0
_TOKEN = re.compile(r"[0-9a-f]{32}")


def is_of_lock(name: str) -> bool:
    """Tell whether an entry of a directory is the lock, or what somebody prepares to take or to look at it."""
    return name == LOCK or name.startswith(f".{LOCK}-")


class RunDirectoryError(RuntimeError):
    """A run directory that cannot be taken: which, why, what to do."""


@dataclass(frozen=True)
class Holder:
    """The holder of a run directory, as its lock says; ``process`` is None while a taker has not written itself down.

    ``silent_s`` are the seconds since its last sign of life, by the clock of the disk.
    """

    token: str
    process: Process | None
    since: str
    directory: str
    silent_s: float

    def lives(self, run_dir: Path) -> bool | None:
        """Tell whether it may still write there; None where only its silence tells, and that is short."""
        if self._holds_another(run_dir):
            return False
        known = None if self.process is None else self.process.lives()
        return False if known is None and self.silent_s > DEAD_AFTER_S else known

    def _holds_another(self, run_dir: Path) -> bool:
        """Tell whether the lock came here as part of a copy, and its holder works where it lay before."""
        own = Path(self.directory)
        if not self.directory or own == run_dir.resolve() or not (own / LOCK / self.token).exists():
            return False
        return not own.samefile(run_dir)

    def __str__(self) -> str:
        if self.process is None:
            return "a process that has just taken it over"
        return f"process {self.process.pid} on {self.process.host} since {self.since}"


def holder(run_dir: Path) -> Holder | None:
    """Return the holder of ``run_dir``; None where nobody holds it, or only somebody who is dead.

    Raises:
        RunDirectoryError: the directory cannot be written, which the clock of its disk needs.
    """
    found = read(run_dir)
    return None if found is None or found.lives(run_dir) is False else found


def record(run_dir: Path, token: str) -> str:
    """Return the content that this process writes into its lock."""
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    said = {"token": token, "since": since, "directory": str(run_dir.resolve()), "process": asdict(Process.this())}
    return json.dumps(said) + "\n"


def read(run_dir: Path) -> Holder | None:
    """Return the holder as written down, dead or alive; None where there is none."""
    lock = run_dir / LOCK
    try:
        tokens = [name for name in os.listdir(lock) if _TOKEN.fullmatch(name)]
        if not tokens:
            return None
        content, touched = (lock / tokens[0]).read_bytes(), (lock / tokens[0]).stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None
    silent_s = _now(run_dir) - touched
    try:
        said = json.loads(content)
        process = Process(**said["process"]) if said["token"] == tokens[0] else None
        if process is not None and not isinstance(process.pid, int):
            raise ValueError(process.pid)
        return Holder(tokens[0], process, str(said["since"]), str(said["directory"]), silent_s)
    except (ValueError, TypeError, KeyError, RecursionError):  # not yet written down, or damaged
        return Holder(tokens[0], None, "", "", silent_s)


def _now(run_dir: Path) -> float:
    """Return the time of the disk that the directory lies on, which need not be that of this machine."""
    probe = run_dir / f".{LOCK}-{uuid.uuid4().hex}"
    try:
        probe.write_text("")
        return probe.stat().st_mtime
    except OSError as error:
        raise RunDirectoryError(f"{run_dir} cannot be written ({error.strerror})") from error
    finally:
        probe.unlink(missing_ok=True)
