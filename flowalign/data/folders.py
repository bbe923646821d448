"""What lies in a folder that a user names."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path

from rewards.picturefiles.kinds import OTHERS, SUFFIXES


def visible(folder: Path, pattern: str) -> list[Path]:
    """Return the files below ``folder`` that match, in order, without hidden ones and those of hidden folders."""
    found = list[Path]()
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]  # not gone through: a home's are the largest
        own = (Path(place, name) for name in names if name[0] != "." and fnmatchcase(name, pattern))
        found += [path for path in own if path.is_file()]
    return sorted(found)


def pictures_of(folder: Path) -> list[Path]:
    """Return the visible files below ``folder`` that are called pictures, those of formats that are not read too."""
    return [path for path in visible(folder, "*") if path.suffix.lower() in (*SUFFIXES, *OTHERS)]
