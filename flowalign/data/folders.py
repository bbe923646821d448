"""What lies in a folder that a user names."""

from __future__ import annotations

from pathlib import Path

from rewards.picturefiles.kinds import OTHERS, SUFFIXES


def visible(folder: Path, pattern: str) -> list[Path]:
    """Return the files below ``folder`` that match, in order, without hidden ones and those of hidden folders."""
    found = (path for path in folder.rglob(pattern) if path.is_file())
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))


def pictures_of(folder: Path) -> list[Path]:
    """Return the visible files below ``folder`` that are called pictures, those of formats that are not read too."""
    return [path for path in visible(folder, "*") if path.suffix.lower() in (*SUFFIXES, *OTHERS)]
