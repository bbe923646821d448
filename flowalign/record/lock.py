"""The lock of a run directory: one process at a time writes into it, on this machine or on any that shares the disk.

The lock is the directory ``lock`` with one file in it, ``<token>``, which says who holds it. It appears whole, by the
rename of a prepared directory, which fails where a file lies in ``lock`` already. To take over is to rename the file of
the old token to one's own: the name belongs to one holder, so that of several takers one succeeds and no new holder is
ever robbed. A holder touches its file and finds it gone where another took over. All of it works on NFS.
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowalign.record.disk import missing, remove_empty
from flowalign.record.holder import DEAD_AFTER_S, LOCK, Holder, RunDirectoryError, read, record

HEARTBEAT_S = 30.0
_PATIENCE_S = 2.0
_WRITTEN = ("config.yaml", "metrics.jsonl", "trackers.json")
_BEGUN_WITH = (
    *_WRITTEN, *(f".{name}.part" for name in _WRITTEN), "samples", "wandb", "tensorboard", "swanlog", "stop"
)  # fmt: skip


class RunHeld(RunDirectoryError):
    """Another process writes into the run directory: its ``holder``, and whether that is known to live."""

    def __init__(self, run_dir: Path, holder: Holder, lives: bool | None) -> None:
        super().__init__(_refusal(run_dir, holder, lives))
        self.holder, self.lives = holder, lives


class LockLost(RuntimeError):
    """Another process took the run directory over; this one writes nothing more."""


class RunLock:
    """A run directory that this process holds, from ``take`` to ``release`` (or the end of ``with``).

    ``said`` tells of a dead holder that it was taken over from. ``begun`` is set by whoever works in the directory once
    there is something to keep: what was put into a new directory before is removed at the end.
    """

    def __init__(self, run_dir: Path, token: str, made: list[Path], said: str) -> None:
        self.run_dir, self.token, self.said = run_dir, token, said
        self.begun = False
        self._file, self._made, self._pid = run_dir.resolve() / LOCK / token, made, os.getpid()
        self._lost, self._end = False, threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="run lock").start()

    @classmethod
    def take(cls, run_dir: Path, *, take_over: bool = False) -> RunLock:
        """Hold ``run_dir``, which is made where it is missing. ``take_over`` does not wait for the silence of a holder
        that cannot be judged; one that is known to live keeps the directory.

        Raises:
            RunHeld: another process holds it.
            RunDirectoryError: it cannot be written.
        """
        token, made = uuid.uuid4().hex, missing(run_dir)
        try:
            return cls(run_dir, token, made, _take(run_dir, token, take_over))
        except OSError as error:
            remove_empty(made)
            reason = f"{run_dir} cannot be written ({error.strerror}); choose another"
            raise RunDirectoryError(f"runs_dir: {reason}") from error
        except BaseException:
            remove_empty(made)
            raise

    def check(self) -> None:
        """Raise LockLost where another process has taken the directory over; to be asked before each writing."""
        if not self._lost:
            with suppress(OSError):  # a disk that is away for a while
                self._lost = not self._touch()
        if self._lost:
            now = read(self.run_dir)
            how = "moved or deleted" if now is None else f"taken over by {now}"
            raise LockLost(f"{self.run_dir} was {how}; this process ends and writes nothing more into it")

    def release(self) -> None:
        """Let go; may be called twice. A child that was forked lets its parent's lock alone."""
        if self._end.is_set() or os.getpid() != self._pid:
            return
        self._end.set()
        if self.run_dir in self._made and not self.begun and self._file.exists():
            for name in _BEGUN_WITH:
                _delete(self.run_dir / name)
        with suppress(OSError):
            self._file.unlink()
            self._file.parent.rmdir()
        if not self.begun:
            remove_empty(self._made)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._end.wait(HEARTBEAT_S):
            with suppress(OSError):
                self._lost = self._lost or not self._touch()

    def _touch(self) -> bool:
        try:
            os.utime(self._file)
        except FileNotFoundError:
            return self._end.is_set()
        return True


def refuse_held(run_dir: Path, *, take_over: bool = False) -> None:
    """Raise RunHeld where `RunLock.take` would; nothing is taken, and no directory made."""
    if (found := read(run_dir)) is not None:
        _refuse(run_dir, found, take_over)


def _refuse(run_dir: Path, found: Holder, take_over: bool) -> bool | None:
    """Return what is known of the life of a holder that the directory can be taken from. Raise RunHeld of any other."""
    lives = found.lives(run_dir)
    if lives or (lives is None and not take_over):
        raise RunHeld(run_dir, found, lives)
    return lives


def _take(run_dir: Path, token: str, take_over: bool) -> str:
    """Take the lock; return what is to be said of it: nothing, or whose lock was taken over."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            if _appear(run_dir, token):
                return ""
            found = read(run_dir)
            lives = None if found is None else _refuse(run_dir, found, take_over)
            if found is not None and _rename(run_dir, found.token, token):
                how = "which is gone" if lives is False else "by --take-over"
                return f"{run_dir} was held by {found}, {how}: taken over"
        except FileNotFoundError:  # whoever made the directory has removed it again, or another has taken over
            if time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            raise RunDirectoryError(f"{run_dir / LOCK} holds other files than a lock; look at it, or delete it")
        time.sleep(0.01)


def _appear(run_dir: Path, token: str) -> bool:
    """Make the lock; False where there is one."""
    draft = run_dir / f".{LOCK}-{token}"
    try:
        draft.mkdir()
        (draft / token).write_text(record(run_dir, token), encoding="utf-8")
        draft.rename(run_dir / LOCK)
        return True
    except OSError as error:
        if (run_dir / LOCK / token).exists():  # done, and the server's answer was lost
            return True
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _rename(run_dir: Path, old: str, new: str) -> bool:
    """Take the lock of ``old`` over; False where another was faster. The file's age begins anew before it has the new
    name, so that nobody judges the new holder by the silence of the old one."""
    lock = run_dir / LOCK
    try:
        os.utime(lock / old)
        (lock / old).rename(lock / new)
    except FileNotFoundError:
        if not (lock / new).exists():
            return False
    with open(os.open(lock / new, os.O_WRONLY | os.O_TRUNC), "w", encoding="utf-8") as file:
        file.write(record(run_dir, new))
    return True


def _refusal(run_dir: Path, found: Holder, lives: bool | None) -> str:
    stop = f"end it with `flowalign stop {shlex.quote(str(run_dir))}`"
    if lives:
        return f"{run_dir} is held by {found}, which still runs: {stop}, or give this run another name"
    return (
        f"{run_dir} is held by {found}, last heard of {max(0, round(found.silent_s))} s ago, which cannot be looked at "
        f"from here: {stop}; if it is gone, add --take-over, or wait until it has been silent for "
        f"{DEAD_AFTER_S / 60:g} minutes"
    )


def _delete(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
