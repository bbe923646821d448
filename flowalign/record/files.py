"""Files: written with the mode that the umask gives (safetensors writes for the owner alone)."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from flowalign.record.disk import writing

PROBE = ".mode"


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; tensors may lie on any device and in any layout."""
    path.unlink(missing_ok=True)  # one that is written over would keep its mode
    path.touch()
    mode = path.stat().st_mode
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)
    path.chmod(mode)


def tensors_size(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of these tensors as a safetensors file; its header is taken for somewhat longer than it is."""
    header = sum(len(name) + 120 for name in tensors)
    return header + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def give_usual_modes(directory: Path) -> None:
    """Give the mode of a new file to every file under ``directory``, which other libraries wrote."""
    probe = directory / PROBE
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode != mode:
            path.chmod(mode)


def stays_below(name: Any) -> bool:
    """Tell whether a file's name, as another file gives it, leads to somewhere below the folder of that one."""
    return isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts and "\0" not in name


def sync(path: Path) -> None:
    """Return once the disk itself holds the file, or the names in the directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Wait until no other process of this machine is inside with the same ``path``, a file that is made for that.

    Where the disk of ``path`` knows no such locks nobody waits.

    Raises:
        DiskError: its folder does not take the file.
    """
    with writing(str(path), path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
