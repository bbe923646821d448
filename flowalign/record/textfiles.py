"""Text files that a user gives: what they hold, or a sentence that names the file, the line and what to do.

Lines end in ``\\n`` or ``\\r\\n`` and in nothing else: U+2028, U+0085 and form feeds are text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rewards.missing import hint

MOST_BYTES = 2_000_000_000
DEEPEST = 64  # lists and mappings inside one another
_BRACKETS = re.compile(r'[\[{\]}]|"(?:[^"\\]|\\.)*+"?', re.DOTALL)  # outside of texts, and texts
_MARKS = {
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_BINARY = {
    b"PK\x03\x04": "a zip archive, such as a spreadsheet (.xlsx)",
    b"PAR1": "a parquet file",
    b"\x1f\x8b": "a gzip archive",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF",
    b"SQLite": "a database",
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")


class TextError(ValueError):
    """A text file that cannot be read, or not understood; says which, and in which line."""


class BadRows(TextError):
    """A file of which some rows are wrong: the first is said, and how many more.

    ``wrong`` has a sentence for each of them by line, ``rows`` the others.
    """

    def __init__(self, wrong: dict[int, str], rows: list[tuple[int, dict[str, Any]]]) -> None:
        super().__init__(wrong[min(wrong)] + and_more(len(wrong) - 1))
        self.wrong, self.rows = wrong, rows


def and_more(count: int) -> str:
    """Return the words that follow the sentence on the first wrong row."""
    return f" ({count} more row{'s are' if count > 1 else ' is'} wrong)" if count else ""


def is_there(path: Path) -> bool:
    """Tell whether there is such a file; a name that no file can have is none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def inside(path: Path, folder: Path) -> bool:
    """Tell whether ``path`` is a file that lies in ``folder``, wherever its links lead."""
    try:
        return path.is_file() and path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):  # of a name that no file can have
        return False


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Raises:
        TextError: there is no such file, it may not be read, it has more than ``most`` bytes, or it holds something
            else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as error:  # of a name with a NUL
        near = hint(path) if isinstance(error, FileNotFoundError) else ""
        raise TextError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}){near}") from error
    if len(content) > most:
        raise TextError(f"{path} has more than {most:,} bytes, which is too large for a file of its kind")
    return decode(content, str(path))


def decode(content: bytes, where: str) -> str:
    """Return ``content`` as text. Raise TextError naming ``where``, the line, and what the bytes look like."""
    text = content.removeprefix(b"\xef\xbb\xbf")
    found = next((what for mark, what in _MARKS.items() if text.startswith(mark)), None) or _wide(text)
    if found is not None:
        raise TextError(f"{where} looks like {found} text; save it as UTF-8")
    if found := next((what for mark, what in _BINARY.items() if text.startswith(mark)), None):
        raise TextError(f"{where} is {found}, not a text file")
    if b"\x00" in text:
        line = text.count(b"\n", 0, text.index(b"\x00")) + 1
        raise TextError(f"{where}, line {line} holds a NUL byte: the file is damaged, or not a text file")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise TextError(f"{where}, line {line} is not UTF-8: {_looks(text, error.start)}") from error


def _wide(text: bytes) -> str | None:
    """Return ``UTF-16`` for a text of that form without a mark, of which every second of the first bytes is zero.

    Otherwise return None.
    """
    head = text[:64]
    half = len(head) // 2
    if half and max(head[0::2].count(0), head[1::2].count(0)) > half * 0.6 and b"\x00\x00" not in head:
        return "UTF-16"
    return None


def _looks(text: bytes, start: int) -> str:
    value = text[start : start + 1]
    if start >= len(text) - 3 and len(text) > 3 and 0xC2 <= value[0] <= 0xF4 and _starts(text[start:]):
        return "it ends within a character; the file was cut off"
    try:
        character = value.decode("cp1252")
    except UnicodeDecodeError:
        return f"the byte 0x{value[0]:02x}; save it as UTF-8"
    return f"the byte 0x{value[0]:02x} looks like {character!r} in Windows-1252 or Latin-1; save it as UTF-8"


def _starts(tail: bytes) -> bool:
    """Tell whether ``tail`` is the first bytes of a character of which the rest is missing."""
    return len(tail) > 1 and all(0x80 <= byte < 0xC0 for byte in tail[1:])


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line) of each line that is not blank, without its end."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def parse_json(text: str, where: str) -> Any:
    """Parse a JSON text to plain data.

    Refused, though Python's own reader takes them, are more than `DEEPEST` levels, keys given twice, numbers that are
    not finite or too large for a float, and halves of characters (``\\ud83d`` alone).

    Raises:
        TextError: says ``where`` and why.
    """
    if _deep(text):
        raise TextError(f"{where} is nested too deeply: more than {DEEPEST} lists and mappings inside one another")
    try:
        value = json.loads(
            text, object_pairs_hook=_mapping, parse_constant=_refuse, parse_float=_number, parse_int=_integer
        )
        if _ESCAPED.search(text):
            _whole(value)
    except RecursionError as error:
        raise TextError(f"{where} is nested too deeply") from error
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise TextError(f"{where} is not JSON ({error.msg}, {at})") from error
    except ValueError as error:
        raise TextError(f"{where}: {error}") from error
    return value


def _deep(text: str) -> bool:
    """Tell whether more than `DEEPEST` brackets are open at once; known before a reader goes down into them."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return False
    depth = 0
    for found in _BRACKETS.finditer(text):
        depth += (found[0] in "[{") - (found[0] in "]}")
        if depth > DEEPEST:
            return True
    return False


def read_json(path: Path) -> Any:
    """Read the plain data in a JSON file. Raise TextError as `read_text` and `parse_json` do."""
    return parse_json(read_text(path), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object, as `read_json`."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise TextError(f"{path} holds {kind_of(value)}, not a JSON object")
    return value


def read_rows(
    path: Path, example: str, check: Callable[[dict[str, Any], str], dict[str, Any]] = lambda row, where: row
) -> list[tuple[int, dict[str, Any]]]:
    """Return (line, object) of a JSON Lines file; blank lines are passed over. ``example`` is a row for who wrote none.

    ``check`` is given each object with where it stands, and answers with what is taken for it, or a TextError.

    Raises:
        TextError: as ``read_text``; or there is no row.
        BadRows: a line is no JSON object, or not one that ``check`` takes.
    """
    rows, wrong = [], dict[int, str]()
    for number, row in json_rows(path, example):
        try:
            if isinstance(row, TextError):
                raise row
            rows.append((number, check(row, f"{path}, line {number}")))
        except TextError as error:
            wrong[number] = str(error)
    if wrong:
        raise BadRows(wrong, rows)
    if not rows:
        raise TextError(f"{path} is empty; write a row a line: {example}")
    return rows


def json_rows(path: Path, example: str) -> Iterator[tuple[int, dict[str, Any] | TextError]]:
    """Yield (line, object) of a JSON Lines file as `read_rows`, and in the place of a line that is none what is wrong.

    Raises:
        TextError: as ``read_text``; or the file as a whole is something else.
    """
    if path.is_dir():
        raise TextError(f"{path} is a directory; give a JSON Lines file")
    text = read_text(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        raise TextError(f"{path} is a table, not JSON Lines; write a row a line: {example}")
    if text.lstrip().startswith("["):
        raise TextError(f"{path} is a JSON array, not JSON Lines; write each row in a line of its own, without [ , ]")
    for number, line in lines_of(text):
        where = f"{path}, line {number}"
        try:
            row = parse_json(line, where)
            if not isinstance(row, dict):
                raise TextError(f"{where} holds {kind_of(row)}, not an object; write a row a line: {example}")
            yield number, row
        except TextError as error:
            advice = f"; write a row a line: {example}" if f"{where} is not JSON" in str(error) else ""
            yield number, TextError(f"{error}{advice}")


def kind_of(value: Any) -> str:
    """Return the word for a kind of value of JSON or YAML."""
    if value is None:
        return "null"
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "a mapping",
    }
    return kinds.get(type(value), type(value).__name__)


def finite(value: Any) -> Any:
    """Return plain data with None in place of NaN and infinities."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number that JSON knows; leave the key out")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.40} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > 300:
        raise ValueError(f"the number {text[:20]}… has {len(text)} digits, which is too large")
    return int(text)


def _whole(value: Any) -> None:
    """Raise ValueError where a text holds half a character."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += [*item, *item.values()]
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, str) and (half := _SURROGATE.search(item)):
            raise ValueError(f"holds half a character (\\u{ord(half[0]):04x} without its other half)")
