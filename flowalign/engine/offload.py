"""What a rank keeps off its device but for the piece that is at work: in pinned memory, or in mapped files.

A file is mapped and has no name: a run that ends, however it ends, leaves nothing behind, and a checkpoint knows
nothing of it. Its pages are given back to the system after each piece of work. The system keeps what it has room for.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from flowalign.record.disk import writing

WHAT = "what learner.offload keeps on disk"


class Room(Protocol):
    """Tensors on the CPU, by name. Those that are ``direct`` are worked on where they lie, if that is on a CPU."""

    tensors: dict[str, Tensor]
    direct: bool

    def release(self, tensor: Tensor) -> None:
        """Give back the memory of a tensor of this room, or of a part of one; what it holds is kept."""
        ...


@dataclass(frozen=True)
class Offload:
    """Where a rank keeps what is seldom at work: ``host``, pinned memory, or ``disk``, files in ``folder``."""

    kind: Literal["host", "disk"]
    folder: Path

    def room(self, like: Mapping[str, Tensor]) -> Room:
        """Return a room of zeros, each of the shape and dtype of a tensor of ``like``.

        Raises:
            DiskError: the disk has no room for it.
        """
        return _Pinned(like) if self.kind == "host" else _Mapped(like, self.folder)


class _Pinned:
    direct = False

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        pinned = torch.cuda.is_available()
        self.tensors = {name: torch.zeros_like(t, device="cpu", pin_memory=pinned) for name, t in like.items()}

    def release(self, tensor: Tensor) -> None:
        """Keep it: nothing else holds it."""


class _Mapped:
    direct = True

    def __init__(self, like: Mapping[str, Tensor], folder: Path) -> None:
        self.tensors: dict[str, Tensor] = {}
        places, size = {}, 0
        for name, tensor in like.items():
            places[name] = size
            size += -(-tensor.numel() * tensor.element_size() // mmap.PAGESIZE) * mmap.PAGESIZE
        if not size:
            self.tensors = {name: torch.zeros_like(t, device="cpu") for name, t in like.items()}
            return
        with writing(WHAT, folder, size):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                # Without its blocks a write to memory would meet the full disk, and end the process by a signal.
                os.posix_fallocate(file.fileno(), 0, size)
                self._file = mmap.mmap(file.fileno(), size)
        flat = torch.frombuffer(self._file, dtype=torch.uint8)
        self._begin = flat.data_ptr()
        for name, tensor in like.items():
            length = tensor.numel() * tensor.element_size()
            own = flat[places[name] : places[name] + length]
            strides = torch.empty_like(tensor, device="meta").stride()  # a layout decides which kernel computes
            self.tensors[name] = own.view(tensor.dtype).as_strided(tensor.shape, strides)

    def release(self, tensor: Tensor) -> None:
        length = tensor.numel() * tensor.element_size()
        if not length:
            return
        begin = tensor.data_ptr() - self._begin
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        # Of a file that is mapped and shared this drops no change, also where a page is another tensor's too.
        self._file.madvise(mmap.MADV_DONTNEED, first, begin + length - first)


@contextmanager
def at_work(room: Room, tensor: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Bring a tensor of ``room``, or a part of one, to ``device``, where it may be changed in place inside."""
    if room.direct and device.type == "cpu":
        yield tensor
    else:
        there = tensor.to(device, non_blocking=True, copy=True)
        yield there
        tensor.copy_(there)
    room.release(tensor)


class Kept(Mapping[str, Tensor]):
    """Copies of tensors by name, on their device, or with an ``offload`` off it.

    What it gives by name is to be read, and before the next is asked for; `changing` is for what changes.
    """

    def __init__(self, named: Mapping[str, Tensor], offload: Offload | None) -> None:
        self._devices = {name: tensor.device for name, tensor in named.items()}
        self._room: Room | None = None
        self._read: Tensor | None = None
        if offload is None:
            self._held = {name: tensor.detach().clone() for name, tensor in named.items()}
            return
        self._room = offload.room(named)
        self._held = self._room.tensors
        for name, tensor in named.items():
            self._held[name].copy_(tensor.detach())
            self._room.release(self._held[name])

    def __getitem__(self, name: str) -> Tensor:
        held = self._held[name]
        if self._room is None:
            return held
        if self._read is not None:
            self._room.release(self._read)
        self._read = held
        return held.to(self._devices[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    @contextmanager
    def changing(self, name: str) -> Iterator[Tensor]:
        """Give the tensor ``name`` on its device, where it may be changed in place inside."""
        if self._room is None:
            yield self._held[name]
            return
        with at_work(self._room, self._held[name], self._devices[name]) as there:
            yield there


def streamed_norm(norms: Iterable[Tensor]) -> float:
    """Return the norm of all tensors together of which ``norms`` are those of each, read one at a time."""
    found = [norm.detach().float() for norm in norms]
    return float(torch.linalg.vector_norm(torch.stack([norm.to(found[0].device) for norm in found]))) if found else 0.0


def parts(length: int, most: int) -> Iterator[slice]:
    """Yield slices of at most ``most`` values that make up ``length``."""
    for i in range(math.ceil(length / most)):
        yield slice(i * most, min(length, (i + 1) * most))
