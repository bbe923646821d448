"""sha256 of files, made in the background and trusted as long as the file system says that nothing has been touched.

A ``Stamp`` tells two states of a file apart even where somebody put its modification time back: no program sets the
time of the last change of an inode. It serves as a shortcut within one run; between runs contents are compared.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

CHUNK = 2**20
MOST_THREADS = 4
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


class Unsteady(OSError):
    """A file that changed while it was read."""


def stamp(path: Path) -> Stamp:
    """Return the state of a file. Raise OSError where there is none."""
    facts = os.stat(path)
    return Stamp(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


def hash_file(path: Path, before: Stamp, ended: threading.Event | None = None) -> str:
    """Return the sha256 of the content that the file had in the state ``before``, read chunk by chunk.

    A file that is in another state afterwards is read once more: Ray unpacks a working directory again and again, over
    equal files.

    Raises:
        Unsteady: its content is another one now. InterruptedError: ``ended`` was set. OSError: it cannot be read.
    """
    found = _read(path, ended)
    if (now := stamp(path)) != before and (_read(path, ended) != found or stamp(path) != now):
        raise Unsteady(f"{path} was changed while it was read")
    return found


def holds(path: Path, known: str) -> bool:
    """Tell whether the file's content has the hash ``known``, whatever state it is in."""
    try:
        return hash_file(path, stamp(path)) == known
    except OSError:
        return False


def _read(path: Path, ended: threading.Event | None) -> str:
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            if ended is not None and ended.is_set():
                raise InterruptedError
    return digest.hexdigest()


class Hashes:
    """Hashes of files, the small ones first, in threads that begin at once; each file is read once.

    On a machine of many cores several files are read side by side.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.stamps: dict[Path, Stamp] = {}
        self._done: dict[Path, str | OSError] = {}
        self._unsteady: Path | None = None
        for path in paths:
            try:
                self.stamps[path] = stamp(path)
            except OSError as error:
                self._done[path] = error
        # Where the last change is as old as that, the next one shows in the stamp, however coarse the clock is.
        self.settled = {path for path, found in self.stamps.items() if found.settled}
        self._ended, self._ready = threading.Event(), threading.Condition()
        waiting = sorted(self.stamps, key=lambda path: self.stamps[path].size, reverse=True)
        threads = min(MOST_THREADS, max(1, (os.cpu_count() or 1) // 4))
        self._threads = [threading.Thread(target=self._work, args=(waiting,), daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _work(self, waiting: list[Path]) -> None:
        while True:
            try:
                path = waiting.pop()
            except IndexError:  # threads share the list
                return
            try:
                found: str | OSError = hash_file(path, self.stamps[path], self._ended)
            except InterruptedError:
                return
            except OSError as error:
                found = error
            with self._ready:
                self._done[path] = found
                self._unsteady = path if isinstance(found, Unsteady) else self._unsteady
                self._ready.notify_all()

    def of(self, path: Path) -> str:
        """Return the hash of one of the files; waits for it.

        Raises:
            Unsteady: it was changed since. OSError: it cannot be read.
        """
        with self._ready:
            self._ready.wait_for(lambda: path in self._done)
        found = self._done[path]
        if isinstance(found, OSError):
            raise found
        return found

    def unsteady(self) -> Path | None:
        """Return a file that was changed before it was hashed, as far as that is known yet."""
        return self._unsteady

    def complete(self) -> bool:
        """Tell whether nobody would have to wait."""
        return not any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """End the thread; nobody may ask for a hash that is not there."""
        self._ended.set()
