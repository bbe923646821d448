"""A metadata.csv beside images: every cell is the text that stands there, and what is malformed names file and line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from flowalign.record.csvfiles import read_csv
from flowalign.record.textfiles import TextError

FILE, IMAGE = "file_name", "image"  # the column of paths, and what it is called once it is read
_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


def tables_of(folder: Path, tables: Sequence[Path], split: str) -> list[Path]:
    """Return the tables of a split, in their order.

    Folders named train, validation or test (``val-2``, ``dev``, …) say which; all others belong to train.

    Raises:
        TextError: there is none.
    """
    of = {table: split_of(table.relative_to(folder).parent) for table in sorted(tables)}
    found = [table for table, own in of.items() if (own or "train") == split]
    if not found:
        has = ", ".join(sorted({own or "train" for own in of.values()}))
        raise TextError(f"{folder} has no split {split!r}; it has {has}")
    return found


def split_of(path: Path) -> str | None:
    """Return the split that the words of a path name; None where they name none."""
    words = set(re.split(r"[-._\s\d/]+", path.as_posix().lower()))
    return next((name for name, known in _SPLITS.items() if words & known), None)


def read_tables(tables: Sequence[Path]) -> dict[str, list[str]]:
    """Return the columns of all tables that have a name, one below the other; ``image`` holds absolute paths.

    Raises:
        TextError: a table is malformed, or has other columns than the first.
    """
    columns: dict[str, list[str]] = {}
    for table in tables:
        rows = _rows(table)
        names = [(name.removesuffix(FILE).rstrip("_") or IMAGE) if name.endswith(FILE) else name for name in next(rows)]
        if not columns:
            columns = {name: [] for name in names if name}
        elif set(columns) != set(filter(None, names)):
            raise TextError(f"{table} has the columns {', '.join(names)}, and {tables[0]} has {', '.join(columns)}")
        for row in rows:
            for name, cell in zip(names, row, strict=True):
                if name:
                    columns[name].append(cell)
    return columns


def _rows(table: Path) -> Iterator[list[str]]:
    """Yield the header and then each row, as long as the header."""
    files = list[int]()
    for line, row in read_csv(table, otherwise="metadata.jsonl"):
        if not files:
            files = [place for place, name in enumerate(row) if name.endswith(FILE)]
            if not files:
                has = ", ".join(map(repr, row))
                raise TextError(f"{table} has no column {FILE!r}, which names the images; its first line says {has}")
        else:
            for place in files:
                row[place] = _path(table, line, row[place])
        yield row


def _path(table: Path, line: int, name: str) -> str:
    """Return the path of an image, below its table; nothing where the cell is empty."""
    if not name.strip():
        return ""
    folder = table.parent.resolve()
    if name != name.strip() and not (folder / name).exists():
        name = name.strip()
    inside = os.path.normpath(name.replace("\\", "/"))
    if "://" in name or os.path.isabs(inside) or inside.split("/")[0] == "..":
        raise TextError(f"{table}, line {line} names {name!r}; write a path relative to the table's folder, below it")
    return str(folder / inside)
