"""Tables of text that a user gives: a cell is the text that stands there, and what is malformed names file and line.

pandas, by which ``datasets`` reads them, takes ``NA`` for nothing and a column of texts such as ``7`` for numbers.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from flowalign.record.textfiles import TextError, read_text

_SEPARATORS = {";": "semicolons", "\t": "tabs"}
_NAMES = {",": "commas", "\t": "tabs"}


def read_csv(table: Path, separator: str = ",", *, otherwise: str = "JSON Lines") -> Iterator[tuple[int, list[str]]]:
    """Yield the header, its names stripped, and then each row that is not blank, with the line that it begins in.

    Rows are as long as the header; a short row ends in empty cells. ``otherwise`` names another form to write.

    Raises:
        TextError: as ``read_text``; or it is no table, or empty.
    """
    text = read_text(table)
    head = re.split(r"[\r\n]", text.lstrip("\r\n "), maxsplit=1)[0].rstrip()
    for mark, words in _SEPARATORS.items():
        if mark != separator and mark in head and separator not in head:
            raise TextError(
                f"{table} has its cells separated by {words} ({head!r}); save it with {_NAMES[separator]}, or as "
                f"{otherwise}"
            )
    padded = any(name != name.strip() for name in head.split(separator))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=padded)
    header, begin = list[str](), 1
    try:
        for row in reader:
            begin, line = reader.line_num + 1, begin
            if not any(cell.strip() for cell in row):
                continue
            if not header:
                header = _header(table, row)
                yield line, header
                continue
            if any(cell.strip() for cell in row[len(header) :]):
                raise TextError(
                    f"{table}, line {line} has {len(row)} cells, and the header has {len(header)}; write a text with "
                    'a comma in quotes, such as "a dog, asleep"'
                )
            yield line, [*row, *[""] * len(header)][: len(header)]
    except csv.Error as error:
        raise TextError(f"{table}, line {begin} is not CSV ({error}); is a quotation mark missing?") from error
    if not header:
        raise TextError(f"{table} is empty")


def _header(table: Path, row: list[str]) -> list[str]:
    names = [name.strip() for name in row]
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise TextError(f"{table} has the column {twice!r} twice")
    return names
