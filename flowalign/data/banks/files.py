"""Files that are whole or not there: written hidden, synced, renamed; what a disk refuses is a DiskError."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from flowalign.record.disk import draft_of, on_disk


@contextmanager
def whole_file(path: Path, needed: int) -> Iterator[Any]:
    """Yield a binary file to write, which becomes ``path`` when closed; ``needed`` bytes are what is expected to fit.

    Raises:
        DiskError: the disk does not take it; nothing is left of it.
    """
    with draft_of(path, needed=on_disk([needed])) as draft, draft.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_bytes(path: Path, parts: Iterable[bytes], size: int) -> dict[str, Any]:
    """Write a file of ``size`` bytes; returns its entry in a manifest: file, sha256, bytes."""
    digest, written = hashlib.sha256(), 0
    with whole_file(path, size) as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            written += len(part)
    return {"file": path.name, "sha256": digest.hexdigest(), "bytes": written}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> dict[str, Any]:
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    return write_bytes(path, [content], len(content))


def write_json(path: Path, content: Any) -> dict[str, Any]:
    text = (json.dumps(content, indent=1) + "\n").encode()
    return write_bytes(path, [text], len(text))
