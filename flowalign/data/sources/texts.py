"""Files of text: a prompt a line, tables, JSON Lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from flowalign.data.sources.place import Place, Read
from flowalign.record.csvfiles import read_csv
from flowalign.record.textfiles import TextError, json_rows, lines_of, parse_json, read_text

EXAMPLE = (
    '{"prompt": "a red dog"}, for the reward geneval {"prompt": "a red dog", "tag": "colors", '
    '"include": [{"class": "dog", "count": 1, "color": "red"}]}'
)
SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
HEADS = ("prompt", "caption", "text")  # of a table's column of prompts, as a text file's first line betrays one


def read_lines(path: Path) -> Iterator[Read]:
    """Yield each line that is not blank as a prompt; of a file that holds JSON Lines all the same their rows.

    Raises:
        TextError: the file cannot be read, or begins with the head of a table.
    """
    first, text = True, read_text(path)
    if "\n" not in text and "\r" in text.strip():
        raise TextError(f"{path} has lines that end in a carriage return alone; save it with the line ends of Unix")
    for number, line in lines_of(text):
        if first and _is_object(line):
            yield from read_json_lines(path)
            return
        if first:
            _refuse_head(line, f"{path}, line {number}")
        first = False
        yield Place(str(path), "line", number), {"prompt": line.strip()}


def read_json_lines(path: Path) -> Iterator[Read]:
    """Yield each object of a JSON Lines file. Raise TextError where the whole file is something else."""
    yield from ((Place(str(path), "line", number), row) for number, row in json_rows(path, EXAMPLE))


def _is_object(line: str) -> bool:
    """Tell whether a line is a row of JSON Lines; older versions read every file as such."""
    try:
        return line.lstrip().startswith("{") and isinstance(parse_json(line, ""), dict)
    except TextError:
        return False


def _refuse_head(line: str, where: str) -> None:
    """Raise TextError for a first line that is no prompt, but the head of a table."""
    columns = [name.strip().strip("\"'").casefold() for name in re.split(r"[,;\t|]", line)]
    if any(name in HEADS for name in columns) and "" not in columns:
        raise TextError(
            f"{where} is the head of a table; give the file the ending .csv (.tsv with tabs), or drop the line"
        )


def header_of(path: Path) -> list[str]:
    """Return the names of a table's columns."""
    return [name for name in next(read_csv(path, SEPARATORS[path.suffix.lower()]))[1] if name]


def read_table(path: Path) -> Iterator[Read]:
    """Yield each row of a table; an empty cell is nothing. Raise TextError where it is no table."""
    rows = read_csv(path, SEPARATORS[path.suffix.lower()])
    _, header = next(rows)
    for line, cells in rows:
        row = {name: cell for name, cell in zip(header, cells, strict=True) if name and cell.strip()}
        yield Place(str(path), "line", line), row
