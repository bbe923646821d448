"""Hashes of files, made in the background."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

from flowalign.record.hashing import Stamp, read_sha256, sha256, stamp

MOST_THREADS = 4


class Unsteady(OSError):
    """A file that changed while it was read."""


def hash_file(path: Path, before: Stamp, ended: threading.Event | None = None) -> str:
    """Return the sha256 of the content that the file had in the state ``before``.

    A file that is in another state afterwards is read once more: Ray unpacks a working directory again and again, over
    equal files.

    Raises:
        Unsteady: its content is another one now. InterruptedError: ``ended`` was set. OSError: it cannot be read.
    """
    found = sha256(path, ended) if before.settled else read_sha256(path, ended)
    if (now := stamp(path)) != before and (read_sha256(path, ended) != found or stamp(path) != now):
        raise Unsteady(f"{path} was changed while it was read")
    return found


def holds(path: Path, known: str) -> bool:
    """Tell whether the file's content has the hash ``known``, whatever state it is in."""
    try:
        return hash_file(path, stamp(path)) == known
    except OSError:
        return False


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
