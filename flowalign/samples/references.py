"""Reference pictures of prompts, for rewards that compare with one: the files that rows name in their ``image``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from flowalign.record.textfiles import is_there
from rewards.interface import Images, InputError
from rewards.missing import hint
from rewards.picturefiles.kinds import kind_of, said_of
from rewards.pictures import FORMATS, PictureError, read

_HEAD = 64  # bytes that tell the format
_KEPT = 64  # pictures; the samples of a group share theirs


def references_of(rows: Sequence[Mapping[str, Any]]) -> list[Images]:
    """Return a uint8 picture (H, W, 3) a row, each of its own size.

    Raises ``InputError`` for a row without ``image``, and for a file that is not there or is no picture.
    """
    return [_reference(row) for row in rows]


def check_reference(row: Mapping[str, Any]) -> None:
    """Raise ``InputError`` for a row whose reference picture is not named, not there, or begins as no picture does."""
    path = row.get("image")
    if not isinstance(path, str) or not path:
        raise InputError('has no "image", the path of its reference picture')
    if not is_there(Path(path)):
        raise InputError(f"its reference picture {path} does not exist{hint(path, typos=False)}")
    if not Path(path).is_file():
        raise InputError(f"its reference picture {path} is no file")
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise InputError(f"its reference picture {path} cannot be read ({error.strerror})") from error
    if kind_of(head) not in FORMATS:
        raise InputError(f"its reference picture {path} {said_of(head, FORMATS)}")


def _reference(row: Mapping[str, Any]) -> Images:
    path = row.get("image")
    if not isinstance(path, str) or not path:
        raise InputError(f"the prompt {row.get('prompt', '')!r:.80} names no reference picture in its `image`")
    try:
        state = Path(path).stat()
        return _read(path, state.st_mtime_ns, state.st_size)
    except (OSError, ValueError, PictureError) as error:  # of a name with a NUL too
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"the reference picture {path} cannot be had ({said})") from error


@lru_cache(maxsize=_KEPT)
def _read(path: str, *state: int) -> Images:
    """Return the picture of a file in a ``state``; nobody may write to it."""
    picture = read(Path(path).read_bytes()).copy()
    picture.setflags(write=False)
    return picture
