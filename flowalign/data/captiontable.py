"""A metadata.csv beside images: every cell is the text that stands there, and what is malformed names file and line."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from flowalign.record.textfiles import TextError, read_text

FILE, IMAGE = "file_name", "image"  # the column of paths, and what it is called once it is read
_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_SEPARATORS = {";": "semicolons", "\t": "tabs"}


def tables_of(folder: Path, tables: Sequence[Path], split: str) -> list[Path]:
    """Return the tables of a split, in their order.

    Folders named train, validation or test (``val-2``, ``dev``, …) say which; all others belong to train.

    Raises:
        TextError: there is none.
    """
    of = {table: _split_of(table.relative_to(folder).parent) for table in sorted(tables)}
    found = [table for table, own in of.items() if (own or "train") == split]
    if not found:
        has = ", ".join(sorted({own or "train" for own in of.values()}))
        raise TextError(f"{folder} has no split {split!r}; it has {has}")
    return found


def _split_of(path: Path) -> str | None:
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
    """Yield the header and then each row, as long as the header; a short row ends in empty cells."""
    text = read_text(table)
    head = re.split(r"[\r\n]", text.lstrip(), maxsplit=1)[0].strip()
    for mark, words in _SEPARATORS.items():
        if mark in head and "," not in head:
            raise TextError(
                f"{table} has its cells separated by {words} ({head!r}); save it with commas, or as metadata.jsonl"
            )
    padded = any(name != name.strip() for name in head.split(","))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=padded)
    header, files = list[str](), list[int]()
    begin = 1
    try:
        for row in reader:
            begin, line = reader.line_num + 1, begin
            if not any(cell.strip() for cell in row):
                continue
            if not header:
                header = _header(table, row)
                files = [place for place, name in enumerate(header) if name.endswith(FILE)]
                yield header
                continue
            if any(cell.strip() for cell in row[len(header) :]):
                raise TextError(
                    f"{table}, line {line} has {len(row)} cells, and the header has {len(header)}; "
                    f'write a caption with a comma in quotes, such as "a dog, asleep"'
                )
            row = [*row, *[""] * len(header)][: len(header)]
            for place in files:
                row[place] = _path(table, line, row[place])
            yield row
    except csv.Error as error:
        raise TextError(f"{table}, line {begin} is not CSV ({error}); is a quotation mark missing?") from error
    if not header:
        raise TextError(f"{table} is empty")


def _header(table: Path, row: list[str]) -> list[str]:
    names = [name.strip() for name in row]
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise TextError(f"{table} has the column {twice!r} twice")
    if not any(name.endswith(FILE) for name in names):
        has = ", ".join(map(repr, names))
        raise TextError(f"{table} has no column {FILE!r}, which names the images; its first line says {has}")
    return names


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
