"""sha256 of files, read once by a process as long as the file system says that nothing has been touched.

A ``Stamp`` tells two states of a file apart even where somebody put its modification time back: no program sets the
time of the last change of an inode. It serves as a shortcut within one process; between two contents are compared.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

CHUNK = 2**20
FRESH_NS = 2 * 10**9  # of a file touched so recently, coarse clocks may hide a second change


class Stamp(NamedTuple):
    """A state of a file; links are followed."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @property
    def settled(self) -> bool:
        """True where the last change is so long ago that another one would show in the time."""
        return time.time_ns() - max(self.changed_ns, self.modified_ns) > FRESH_NS


def stamp(path: Path) -> Stamp:
    """Return the state of a file. Raise OSError where there is none."""
    facts = os.stat(path)
    return Stamp(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


class _Content:
    """What a file holds in one state; who asks while another thread reads it waits."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sha256: str | None = None


@lru_cache(maxsize=4096)
def _content(path: Path, state: Stamp, settled: bool) -> _Content:
    return _Content()


def sha256(path: Path, ended: threading.Event | None = None) -> str:
    """Return the hash of the content; a file that has not changed since is not read again by this process.

    Raises:
        InterruptedError: ``ended`` was set. OSError: it cannot be read.
    """
    now = stamp(path)
    content = _content(path, now, now.settled)  # one that was fresh counts for nothing once it has settled
    with content.lock:
        if content.sha256 is None:
            content.sha256 = read_sha256(path, ended)
        return content.sha256


def read_sha256(path: Path, ended: threading.Event | None = None) -> str:
    """Return the hash of the content, which is read chunk by chunk, whatever is known.

    Raises:
        InterruptedError: ``ended`` was set. OSError: it cannot be read.
    """
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            if ended is not None and ended.is_set():
                raise InterruptedError
    return digest.hexdigest()
