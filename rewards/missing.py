"""Hints on a file that is not there: the name that is, or why nobody could find this one."""

from __future__ import annotations

import os
import re
import unicodedata
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

_ALIKE = 0.75
_COMPARED = 2000  # names of a folder among which a typing error is looked for


def hint(path: str | os.PathLike[str], *, typos: bool = True) -> str:
    """Return `` (did you mean 'NAME'?)``, to be put behind what is said of a missing ``path``.

    It is empty where nothing is known.

    NAME is as it stands on the disk: in other capitals, in another Unicode composition (macOS keeps ``é`` as two
    characters), or, with ``typos``, nearly so. A variable or a ``~user`` that nobody expanded is named.
    """
    text = os.fspath(path)
    if variable := re.search(r"\$(\w+|\{\w+\})", text):
        return f" ({variable[0]} is not expanded here; write the path out)"
    if user := re.search(r"(?:^|/)(~[A-Za-z_][\w-]*)(?:/|$)", text):
        return f" ({user[1]} is not expanded: there is no such user; write the path out)"
    near = _nearest(Path(text), typos)
    if near is None:
        return ""
    name, found = near
    if unicodedata.normalize("NFC", found) == unicodedata.normalize("NFC", name):
        return f" (did you mean {found!a}? It is written with other Unicode composition than {name!a})"
    shown = repr(found) if unicodedata.normalize("NFC", found) == found else ascii(found)
    return f" (did you mean {shown}?)"


def _nearest(path: Path, typos: bool) -> tuple[str, str] | None:
    """Return the first part of ``path`` that is not there, and what is in its place."""
    try:
        folder = next(parent for parent in path.parents if parent.is_dir())
        name = path.relative_to(folder).parts[0]
        if os.path.lexists(folder / name):
            return None
        names = _names(folder, folder.stat().st_mtime_ns)
    except (OSError, ValueError, IndexError, StopIteration):
        return None
    found = names.get(_folded(name))
    if found is None and typos and len(names) <= _COMPARED:
        found = next(iter(get_close_matches(name, names.values(), n=1, cutoff=_ALIKE)), None)
    return None if found is None else (name, found)


@lru_cache(maxsize=4)
def _names(folder: Path, changed: int) -> dict[str, str]:
    """Return the names in a folder, by the folded name.

    A data set may ask for thousands of files that are not there.
    """
    return {_folded(entry.name): entry.name for entry in os.scandir(folder)}


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
