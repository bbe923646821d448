"""Folders of prompts: which files they are, and of which split."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from flowalign.data.captiontable import split_of
from flowalign.data.folders import visible
from flowalign.data.sources.texts import SEPARATORS
from flowalign.record.textfiles import TextError

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".jl")
TRAIN = "train"
_UNREAD = ("readme", "license", "licence", "requirements", "notice")


def files_of(path: Path, split: str | None) -> list[Path]:
    """Return the files of prompts that a path leads to: itself, or those of a split in a folder, in the order of names.

    Folders, and files whose names begin so, that are called train, validation or test say which split; all others
    belong to train.

    Raises:
        TextError: there are none, they are of several kinds, or there is no such split.
    """
    if not path.is_dir():
        if split is not None:
            raise TextError(f"{path} is one file, which has no splits; leave `split` out")
        return [path]
    known = (".txt", *SEPARATORS, *JSON_LINES, ".parquet")
    files = [file for file in visible(path, "*") if file.suffix.lower() in known and file.stem.lower() not in _UNREAD]
    if not files:
        raise TextError(f"{path} is a directory without prompts; it needs .txt, .csv, .tsv, .jsonl or .parquet files")
    if len(kinds := list(dict.fromkeys(file.suffix.lower() for file in files))) > 1:
        named = " and ".join(next(file.name for file in files if file.suffix.lower() == kind) for kind in kinds[:2])
        raise TextError(f"{path} holds files of several kinds, {named}; give one of them")
    of = {file: _split_of(file.relative_to(path)) for file in files}
    wanted = chosen_split(str(path), list(dict.fromkeys(of.values())), split)
    return [file for file, own in of.items() if own == wanted]


def _split_of(path: Path) -> str:
    first = re.split(r"[-._\s\d]+", path.stem)[0]
    return split_of(path.parent) or split_of(Path(first)) or TRAIN


def chosen_split(source: str, known: Iterable[str], split: str | None) -> str:
    """Return the split that is asked for: by default train, or the only one. Raise TextError where there is none."""
    there = sorted(known)
    if split is None and (TRAIN in there or len(there) == 1):
        return TRAIN if TRAIN in there else there[0]
    if split in there:
        return str(split)
    which = f"has no split {split!r}" if split is not None else "has several splits and none is called train"
    raise TextError(f"{source} {which}; name one as `split`: {', '.join(there)}")
