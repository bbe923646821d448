"""The embeddings of a bank's prompts in one safetensors file, written row by row: the table may exceed memory.

Shapes: P prompts, L tokens, D and E widths.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.data.banks.bank import LatentsError
from flowalign.data.banks.captions import NULL
from flowalign.data.banks.files import write_bytes
from flowalign.models.encoders import Encoders
from flowalign.record.disk import on_disk, require_room

_NAMES = {torch.float16: "F16", torch.float32: "F32"}


def write_embeddings(
    path: Path, encoders: Encoders, prompts: Sequence[str], length: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Write ``tokens`` (P, L, D), ``pooled`` (P, E), ``null_tokens``, ``null_pooled``; return the manifest's entry.

    Raises:
        DiskError: before the first prompt where the disk cannot hold all of it. LatentsError: a number is too
            large for ``dtype``.
    """
    empty = encoders.encode_prompts(("",), length, full=True).null
    null = {name: _narrow(rows[0], dtype) for name, rows in empty.items()}
    shapes = {name: (len(prompts), *row.shape) for name, row in null.items()}
    shapes |= {f"{NULL}{name}": tuple(row.shape) for name, row in null.items()}
    header, size = _header(shapes, dtype)
    require_room(str(path), path, on_disk([size]))

    def parts() -> Iterator[bytes]:
        yield header
        first, *others = null  # the first are long and written at once
        kept: dict[str, list[Tensor]] = {name: [] for name in others}
        for prompt in prompts:
            own = encoders.encode_prompts((prompt,), length, full=True).text
            row = {name: _narrow(rows[0], dtype) for name, rows in own.items()}
            yield _bytes(row[first])
            for name in others:
                kept[name].append(row[name])
        yield from (_bytes(row) for name in others for row in kept[name])
        yield from map(_bytes, null.values())

    entry = write_bytes(path, parts(), size)
    return {**entry, "count": len(prompts), "dtype": str(dtype).removeprefix("torch."), "max_sequence_length": length}


def _header(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> tuple[bytes, int]:
    """Return the head of a safetensors file with these tensors one after the other, and the size of the whole file."""
    described, begin = {}, 0
    for name, shape in shapes.items():
        end = begin + torch.Size(shape).numel() * dtype.itemsize
        described[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + begin


def _narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = tensor.detach().to(dtype).cpu().contiguous()
    if not bool(narrow.isfinite().all()):
        raise LatentsError(f"--embeddings: an embedding does not fit into {dtype}; take float32")
    return narrow


def _bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
