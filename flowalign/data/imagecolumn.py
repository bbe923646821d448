"""The bytes of an image file from what a column holds: the file itself, or a path to it."""

from __future__ import annotations

import errno
import os
import stat
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from rewards.missing import hint

SHOWN = 80  # characters of a path in a reason


class NoImage(ValueError):
    """A row without an image file; its text is the reason, to be read after the row's name."""


class RowFolders:
    """The folders where the paths of a row are looked for: first its own parquet file's, then the whole source's."""

    def __init__(self, source: Path, files: Sequence[Path]) -> None:
        self._root = source if source.is_dir() else source.parent
        self._files, self._ends = files, list[int]()

    def __call__(self, number: int) -> tuple[Path, ...]:
        if not self._files:
            return (self._root,)
        if not self._ends:
            from pyarrow.parquet import ParquetFile

            self._ends = list(accumulate(ParquetFile(file).metadata.num_rows for file in self._files))
        own = self._files[min(bisect_right(self._ends, number), len(self._files) - 1)].parent
        return tuple(dict.fromkeys((own, self._root)))


def path_of(value: Any) -> str | None:
    """Return the path that a value is or has, as it is written there."""
    path = value.get("path") if isinstance(value, dict) else value
    return path if isinstance(path, str) and path else None


def content_of(value: Any, column: str, folders: Sequence[Path]) -> bytes:
    """Return the content of an image column's value, as `image_of`. Raise OSError where a file cannot be read."""
    found = image_of(value, column, folders)
    return found if isinstance(found, bytes) else found.read_bytes()


def image_of(value: Any, column: str, folders: Sequence[Path]) -> bytes | Path:
    """Return an image column's value: bytes, ``{"bytes", "path"}``, or a path relative to ``folders``.

    Raises:
        NoImage: the reason. OSError: it cannot be told whether there is such a file.
    """
    inside = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(inside, bytes):
        return inside
    if (path := path_of(value)) is not None:
        return _found(path, column, folders)
    if value is None or isinstance(value, dict):
        raise NoImage(f"has no image in the column {column}")
    raise NoImage(f"holds a {type(value).__name__} in the column {column}; give image files or paths to them")


def _found(path: str, column: str, folders: Sequence[Path]) -> Path:
    if path.startswith("data:") or len(path) > 4096:
        raise NoImage(f"holds encoded text in the column {column}; give image files or paths to them")
    shown = path if len(path) <= SHOWN else path[: SHOWN - 1] + "…"
    if "://" in path:
        raise NoImage(f"names {shown} in the column {column}, which is not fetched; give image files or paths to them")
    for written in dict.fromkeys((path, path.replace("\\", "/"))):
        for folder in folders or (Path.cwd(),):
            if _is_file(candidate := folder / written):
                return candidate
    within = "" if not folders or Path(path).is_absolute() else f" in {folders[0]}"
    near = hint((folders[0] if folders else Path.cwd()) / path, typos=False)
    raise NoImage(f"names {shown} in the column {column}, and there is no such file{within}{near}")


def _is_file(path: Path) -> bool:
    """Tell whether a file is there. Raise OSError where that cannot be told."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return False
        raise
