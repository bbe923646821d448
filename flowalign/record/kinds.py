"""Kinds of files that a run directory may hold: a directory where files go, a regular file where text goes."""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from flowalign.record.holder import LOCK, RunDirectoryError

FILES = ("config.yaml", "metrics.jsonl", "report.html", "stop", "trackers.json")
FOLDERS = ("checkpoints", "samples", "set_aside", "wandb", "tensorboard", "swanlog", LOCK)
_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_kinds(run_dir: Path) -> None:
    """Raise RunDirectoryError that names everything in ``run_dir`` that is not of the kind a run writes there.

    What is not there is made. Links count as what they lead to; one that leads nowhere is wrong.
    """
    itself = _fault(run_dir, str(run_dir), folder=True)
    wrong = [itself] if itself is not None else list(_wrong(run_dir))
    if wrong:
        what = itself or f"{run_dir} cannot be used: {'; '.join(wrong)}"
        again = shlex.quote(f"name={run_dir.name}-2")
        it = "it" if len(wrong) == 1 else "them"
        raise RunDirectoryError(f"{what}; move {it} away, or give this run another name: {again}")


def _wrong(run_dir: Path) -> Iterator[str]:
    for names, folder in ((FOLDERS, True), (FILES, False)):
        for name in names:
            if (found := _fault(run_dir / name, name, folder=folder)) is not None:
                yield found
    if (run_dir / "samples").is_dir():
        for path in sorted((run_dir / "samples").glob("iteration_*")):
            if (found := _fault(path, f"samples/{path.name}", folder=True)) is not None:
                yield found


def _fault(path: Path, name: str, *, folder: bool) -> str | None:
    kind, wanted = kind_of(path), "a directory" if folder else "a file"
    return None if kind in (None, wanted) else f"{name} is {kind}, not {wanted}"


def kind_of(path: Path) -> str | None:
    """Return the kind of what lies there, links followed; None where nothing does, or the system does not say."""
    try:
        return _KINDS.get(stat.S_IFMT(path.stat().st_mode), "something unknown")
    except OSError as error:
        if path.is_symlink():
            circle = error.errno == errno.ELOOP
            return "a link in a circle" if circle else f"a link to {os.readlink(path)}, which is not there"
        return None


def read_regular(path: Path) -> bytes:
    """Return the content of a file.

    Raise OSError for a directory, a device, and a FIFO, whose reader would wait for ever.
    """
    with _opened(path) as file:
        return file.read()


def regular_size(path: Path) -> int:
    """Return the size of a file that can be read. Raise OSError as `read_regular` does."""
    with _opened(path) as file:
        return os.fstat(file.fileno()).st_size


def _opened(path: Path) -> BinaryIO:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(stat.S_IFMT(mode), 'something unknown')}", str(path))
    return open(handle, "rb")
