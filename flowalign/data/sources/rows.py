"""What is made of a row of a source: whether it is kept, its names here, and whether it is right."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from flowalign.config.prompts import NEGATIVE, PromptsConfig
from flowalign.data.sources.place import Place, Row
from flowalign.record.textfiles import TextError, is_there, kind_of
from rewards.missing import hint

TEXTS = ("text", "caption")  # what other tools call a prompt
MOST_WEIGHT = 1000
MOST_CHARACTERS = 131_072  # of a prompt, as of a cell of a table; no encoder reads a hundredth of them
TEXT_KEYS = ("prompt", NEGATIVE, "tag", "task", "image")


class NoPrompt(TextError):
    """A row without a prompt."""


def row_filter(where: Mapping[str, Any]) -> Callable[[Row, Place], bool]:
    """Return what tells whether a row has the values that are asked for."""
    ranges = {name: wanted for name, wanted in where.items() if isinstance(wanted, dict)}
    values = {
        name: {text for value in (wanted if isinstance(wanted, list) else [wanted]) for text in _texts(value)}
        for name, wanted in where.items()
        if name not in ranges
    }

    def keeps(row: Row, place: Place) -> bool:
        if any(_texts(row.get(name)).isdisjoint(wanted) for name, wanted in values.items()):
            return False
        return all(_within(row.get(name), wanted, f"{place}: {name!r}") for name, wanted in ranges.items())

    return keeps


def _within(value: Any, wanted: Mapping[str, float], what: str) -> bool:
    if value is None:
        return False
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TextError(f"{what} is {value!r:.80}, which is no number; `where` asks for a range of it") from None
    return wanted.get("min", number) <= number <= wanted.get("max", number)


def as_text(value: Any) -> str | None:
    """Return a cell as a table of text has it, so that a 5 is found whether it is a number or a text."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _texts(value: Any) -> frozenset[str | None]:
    """Return what may stand in a table for a value: a program that has lost a cell writes its 5 as 5.0, and True is
    what Python writes."""
    if isinstance(value, bool):
        return frozenset({as_text(value), str(value), str(value).upper()})
    if isinstance(value, float) and value.is_integer():
        return frozenset({as_text(value), str(int(value))})
    return frozenset({as_text(value)})


def row_taker(asked: PromptsConfig, folder: Path | None) -> Callable[[Row, Place], tuple[Row, int]]:
    """Return what gives a row its names here, and how often it is drawn."""
    if not asked.columns:
        return lambda row, place: (_beside(row, folder), 1)
    columns = {name: column for name, column in asked.columns.items() if column is not None}
    gone = {*asked.columns, *columns.values()}

    def take(row: Row, place: Place) -> tuple[Row, int]:
        own = {name: value for name, value in row.items() if name not in gone}
        own |= {name: row[column] for name, column in columns.items() if row.get(column) is not None}
        weight = _weight(own.pop("weight", 1), place) if "weight" in columns else 1
        if "image" in columns and "image" in own:
            own["image"] = _picture(own["image"], folder, f'{place}: "{columns["image"]}"')
            return own, weight
        return _beside(own, folder), weight

    return take


def _beside(row: Row, folder: Path | None) -> Row:
    """Return a row with the path of its reference picture absolute, where such a file lies beside the source."""
    path = row.get("image")
    if folder is None or not isinstance(path, str) or not path or not is_there(found := (folder / path).absolute()):
        return row
    return {**row, "image": str(found)}


def _weight(value: Any, place: Place) -> int:
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = -1.0
    if not weight.is_integer() or not 0 <= weight <= MOST_WEIGHT or isinstance(value, bool):
        raise TextError(f"{place}: the weight is {value!r:.40}; write a whole number from 0 to {MOST_WEIGHT}")
    return int(weight)


def _picture(value: Any, folder: Path | None, what: str) -> str:
    if not isinstance(value, str):
        raise TextError(f"{what} is {kind_of(value)}; write the path of a picture")
    if folder is None or "://" in value:
        raise TextError(f"{what} is {value!r}, and only pictures that are files here can be read; give their paths")
    path = folder / value
    if not is_there(path):
        raise TextError(f"{what}: {path} does not exist{hint(path, typos=False)}")
    return str(path.absolute())


def has_no_prompt(row: Row) -> bool:
    """Tell whether a row has no prompt, or an empty one; what is no text is neither."""
    prompt = row.get("prompt")
    return prompt is None or (isinstance(prompt, str) and not prompt.strip())


def check_row(row: Row, place: Place, columns: Mapping[str, str | None]) -> None:
    """Raise TextError where a row has no prompt, or a text, a task or a picture is something else."""
    prompt, name = row.get("prompt"), columns.get("prompt", "prompt")
    if "prompt" not in row or (prompt is not None and has_no_prompt(row)):
        near = get_close_matches("prompt", row, n=1) or [key for key in TEXTS if key in row]
        found = f" (it has {near[0]!r})" if "prompt" not in row and near else ""
        said = "is empty; write a text" if "prompt" in row else "is missing; write a text"
        raise NoPrompt(f'{place}: "{name}" {said}{found}, or leave such rows out: drop: [empty]')
    if not isinstance(prompt, str):
        raise TextError(f'{place}: "{name}" is {kind_of(prompt)}; write a text')
    if len(prompt) > MOST_CHARACTERS:
        raise TextError(
            f'{place}: "{name}" has {len(prompt):,} characters, and at most {MOST_CHARACTERS:,} are read; are line '
            "ends missing?"
        )
    negative = row.get("negative_prompt")
    if negative is not None and not isinstance(negative, str):
        own = columns.get("negative_prompt", "negative_prompt")
        raise TextError(f'{place}: "{own}" is {kind_of(negative)}; write a text, or leave it out')
    for key in TEXT_KEYS:
        if isinstance(text := row.get(key), str) and "\0" in text:
            raise TextError(f'{place}: "{columns.get(key, key)}" holds a NUL character')
    for key in ("tag", "task"):
        if isinstance(row.get(key), dict | list):
            raise TextError(f"{place}: {columns.get(key, key)!r} is {kind_of(row[key])}; write one name")
