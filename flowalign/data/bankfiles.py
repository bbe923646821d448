"""Files that are whole or not there: written hidden, synced, renamed; a full disk is said in one sentence."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from flowalign.data.bank import LatentsError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(LatentsError):
    """A file that did not fit; whatever was finished before is untouched."""

    def __init__(self, path: Path, needed: int, cause: OSError) -> None:
        self.path, self.needed, self.cause = path, needed, cause
        free = shutil.disk_usage(path.parent).free
        super().__init__(
            f"{path} needs {megabytes(needed)}, {path.parent} has {megabytes(free)} free ({cause.strerror})"
        )


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


@contextmanager
def whole_file(path: Path, needed: int) -> Iterator[Any]:
    """A binary file to write, which becomes ``path`` when closed; ``needed`` bytes are what is expected to fit.

    Raises:
        DiskFullError: it did not fit. OSError: anything else.
    """
    draft = path.with_name(f".{path.name}.part")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        if error.errno in FULL:
            raise DiskFullError(path, needed, error) from error
        raise


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
