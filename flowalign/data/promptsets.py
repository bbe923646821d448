"""The prompts of a run: the rows of a source that are asked for, checked, in an order that no reader decides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from flowalign.config.prompts import HUB, SHAPES, Prompts, PromptsConfig
from flowalign.data.promptfiles import Place, Row, Source, read_source, state_of
from flowalign.record.textfiles import TextError, and_more, is_there, kind_of
from flowalign.shapes import prompts as shapes
from rewards.missing import hint

SHIPPED = ("shapes:train", "shapes:eval")
TEXTS = ("text", "caption")  # what other tools call a prompt
MOST_WEIGHT = 1000
_ORDERED = ("prompt", "negative_prompt", "task", "tag")  # by which a shuffle tells rows apart: texts in every format
_SHOWN = 8  # values of a column that are named


class PromptsError(ValueError):
    """Prompts that are missing, empty or malformed."""


class SourceError(PromptsError):
    """Prompts that cannot be had as they are asked for: the ``reason``, and the ``key`` in their section, if any."""

    def __init__(self, reason: str, key: str = "") -> None:
        super().__init__(f"data.prompts{key and '.'}{key}: {reason}")
        self.reason, self.key = reason, key


class BadPrompts(SourceError):
    """A source of which some rows are wrong: the first is said, and how many more.

    ``wrong`` has a sentence for each of them by its number in the source, ``rows`` the others with where they stand;
    ``empty`` are the numbers of those that have no prompt.
    """

    def __init__(self, wrong: dict[int, str], rows: dict[int, tuple[Place, Row]], empty: frozenset[int]) -> None:
        super().__init__(f"{wrong[min(wrong)]}{and_more(len(wrong) - 1)}")
        self.wrong, self.rows, self.empty = wrong, rows, empty


class NoPrompt(TextError):
    """A row without a prompt."""


def load_prompts(prompts: Prompts) -> list[Row]:
    """Load rows with at least ``prompt``, of a source or of the part of one that a section says.

    The rows are the caller's own; one of weight 3 is there three times.

    Raises:
        PromptsError: names the file and the line or row.
    """
    return [dict(row) for _, row in _kept(prompts)]


def placed_prompts(prompts: Prompts) -> list[tuple[Place, Row]]:
    """Load prompts as `load_prompts`, each row with where it stands: the file and its line, or the row of a table."""
    return [(where, dict(row)) for where, row in _kept(prompts)]


def as_section(prompts: Prompts) -> PromptsConfig:
    """Return the section that means the same as a text."""
    return PromptsConfig(source=prompts) if isinstance(prompts, str) else prompts


def _kept(prompts: Prompts) -> Sequence[tuple[Place, Row]]:
    asked = _absolute(as_section(prompts))
    try:
        return _selected(asked.model_dump_json(), state_of(asked.source))
    except (TextError, OSError) as error:
        raise SourceError(str(error)) from error


def _absolute(asked: PromptsConfig) -> PromptsConfig:
    """Return what is asked for with an absolute path.

    Raises:
        PromptsError: there is no such source.
    """
    if asked.source in SHIPPED or asked.source.startswith(HUB):
        return asked
    if asked.source.startswith(SHAPES):
        raise SourceError(f"there is no {asked.source}; the shipped ones are {' and '.join(SHIPPED)}")
    return asked.model_copy(update={"source": str(Path(asked.source).absolute())})


@lru_cache(maxsize=4)
def _selected(asked: str, state: tuple[Any, ...]) -> tuple[tuple[Place, Row], ...]:
    """Return the rows that are ``asked`` for, as JSON, of files in a ``state``.

    They are kept, since several checks and then the run itself ask for them.
    """
    own = PromptsConfig.model_validate_json(asked)
    return tuple(select(own, _read(own.source, own.split, own.subset, own.revision, state)))


@lru_cache(maxsize=2)
def _read(source: str, split: str | None, subset: str | None, revision: str | None, state: tuple[Any, ...]) -> Source:
    """Return what a source holds; training and evaluation often take parts of one."""
    if source in SHIPPED:
        rows = shapes.prompts("train" if source == "shapes:train" else "eval")
        placed = [(Place(source, "row", number), row) for number, row in enumerate(rows, start=1)]
        return Source(list(placed), list(dict.fromkeys(name for row in rows for name in row)))
    return read_source(PromptsConfig(source=source, split=split, subset=subset, revision=revision))


def select(asked: PromptsConfig, source: Source) -> list[tuple[Place, Row]]:
    """Return the rows that are asked for: renamed, filtered, checked, then shuffled, cut to a range, and weighted.

    Raises:
        BadPrompts: rows are wrong. SourceError: there is no such column, or nothing is left.
    """
    _check_columns(asked, source)
    keeps, take = _filter(asked.where), _taker(asked, source.folder)
    kept, wrong, seen, left_out = dict[int, tuple[Place, Row]](), dict[int, str](), set[str](), 0
    weights, empty = dict[int, int](), set[int]()
    for number, (place, row) in enumerate(source.rows):
        try:
            if isinstance(row, TextError):
                raise row
            if not keeps(row, place):
                left_out += 1
                continue
            taken, weights[number] = take(row, place)
            if "empty" in asked.drop and not (taken.get("prompt") or "").strip():
                continue
            check_row(taken, place, asked.columns)
            if "duplicates" in asked.drop and taken["prompt"] in seen:
                continue
            seen.add(taken["prompt"])
            kept[number] = place, taken
        except TextError as error:
            wrong[number] = str(error)
            empty |= {number} if isinstance(error, NoPrompt) else set()
    if wrong:
        raise BadPrompts(wrong, kept, frozenset(empty))
    if not kept:
        raise _all_left_out(asked, source, left_out)
    order = list(kept) if asked.shuffle is None else _shuffled(kept, asked.shuffle)
    chosen = list(islice(order, asked.skip, None if asked.limit is None else asked.skip + asked.limit))
    if not chosen:
        raise SourceError(f"{asked.skip} leaves nothing of the {len(kept)} rows of {asked.source}; skip fewer", "skip")
    found = [kept[number] for number in chosen for _ in range(weights[number])]
    if not found:
        raise SourceError(f"all {len(chosen)} rows of {asked.source} have weight 0; give one another", "columns.weight")
    return found


def _check_columns(asked: PromptsConfig, source: Source) -> None:
    known = [name for name in source.columns if name]
    has = f"it has {', '.join(known[:_SHOWN])}" + (f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else "")
    for key, columns in (("columns", asked.columns), ("where", {name: name for name in asked.where})):
        for name, column in columns.items():
            if column is not None and column not in known:
                near = get_close_matches(column, known, n=1)
                said = f"did you mean {near[0]!r}?" if near else has
                raise SourceError(f"{asked.source} has no column {column!r}; {said}", f"{key}.{name}")
    if asked.columns.get("prompt") is None and "prompt" not in known and known:
        likely = next((name for name in known if name.lower() in ("prompt", "prompts", *TEXTS)), "NAME")
        raise SourceError(
            f"{asked.source} has no column 'prompt'; {has}; say which one holds the prompts: "
            f"{{source: {Path(asked.source).name}, columns: {{prompt: {likely}}}}}"
        )


def _filter(where: Mapping[str, Any]) -> Callable[[Row, Place], bool]:
    """Return what tells whether a row has the values that are asked for."""
    ranges = {name: wanted for name, wanted in where.items() if isinstance(wanted, dict)}
    values = {
        name: {as_text(value) for value in (wanted if isinstance(wanted, list) else [wanted])}
        for name, wanted in where.items()
        if name not in ranges
    }

    def keeps(row: Row, place: Place) -> bool:
        if any(as_text(row.get(name)) not in wanted for name, wanted in values.items()):
            return False
        return all(_within(row.get(name), wanted, f"{place}: {name!r}") for name, wanted in ranges.items())

    return keeps


def _within(value: Any, wanted: Mapping[str, float], what: str) -> bool:
    if value is None:
        return False
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TextError(f"{what} is {value!r}, which is no number; `where` asks for a range of it") from None
    return wanted.get("min", number) <= number <= wanted.get("max", number)


def as_text(value: Any) -> str | None:
    """Return a cell as a table of text has it, so that a 5 is found whether it is a number or a text."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _taker(asked: PromptsConfig, folder: Path | None) -> Callable[[Row, Place], tuple[Row, int]]:
    """Return what gives a row its names here, and how often it is drawn."""
    if not asked.columns:
        return lambda row, place: (row, 1)
    columns = {name: column for name, column in asked.columns.items() if column is not None}
    gone = {*asked.columns, *columns.values()}

    def take(row: Row, place: Place) -> tuple[Row, int]:
        own = {name: value for name, value in row.items() if name not in gone}
        own |= {name: row[column] for name, column in columns.items() if row.get(column) is not None}
        weight = _weight(own.pop("weight", 1), place) if "weight" in columns else 1
        if "image" in columns and "image" in own:
            own["image"] = _picture(own["image"], folder, f'{place}: "{columns["image"]}"')
        return own, weight

    return take


def _weight(value: Any, place: Place) -> int:
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = -1.0
    if not weight.is_integer() or not 0 <= weight <= MOST_WEIGHT or isinstance(value, bool):
        raise TextError(f"{place}: the weight is {value!r}; write a whole number from 0 to {MOST_WEIGHT}")
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


def check_row(row: Row, place: Place, columns: Mapping[str, str | None]) -> None:
    """Raise TextError where a row has no prompt, or a text, a task or a picture is something else."""
    prompt, name = row.get("prompt"), columns.get("prompt", "prompt")
    if "prompt" not in row or (isinstance(prompt, str) and not prompt.strip()):
        near = get_close_matches("prompt", row, n=1) or [key for key in TEXTS if key in row]
        found = f" (it has {near[0]!r})" if "prompt" not in row and near else ""
        said = "is empty; write a text" if "prompt" in row else "is missing; write a text"
        raise NoPrompt(f'{place}: "{name}" {said}{found}, or leave such rows out: drop: [empty]')
    if not isinstance(prompt, str):
        raise TextError(f'{place}: "{name}" is {kind_of(prompt)}; write a text')
    if "\0" in prompt:
        raise TextError(f'{place}: "{name}" holds a NUL character')
    negative = row.get("negative_prompt")
    if negative is not None and not isinstance(negative, str):
        own = columns.get("negative_prompt", "negative_prompt")
        raise TextError(f'{place}: "{own}" is {kind_of(negative)}; write a text, or leave it out')
    for key in ("tag", "task"):
        if isinstance(row.get(key), dict | list):
            raise TextError(f"{place}: {columns.get(key, key)!r} is {kind_of(row[key])}; write one name")


def _all_left_out(asked: PromptsConfig, source: Source, by_filter: int) -> SourceError:
    """Return what to say where no row is left, of which so many were left out ``by_filter``."""
    count = f"none of the {len(source.rows)} rows of {asked.source}"
    if by_filter < len(source.rows):
        return SourceError(
            f"{count} {'that `where` keeps ' * bool(by_filter)}has a prompt; `drop` leaves all out", "drop"
        )
    for column, wanted in asked.where.items():
        keeps, rows = _filter({column: wanted}), [(row, place) for place, row in source.rows if isinstance(row, dict)]
        if not any(keeps(*row) for row in rows):
            known = list(dict.fromkeys(str(as_text(row.get(column))) for row, _ in rows))
            more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
            said = f"{count} has {wanted!r} there; it has {', '.join(known[:_SHOWN])}{more}"
            return SourceError(said, f"where.{column}")
    return SourceError(f"{count} has all of {', '.join(asked.where)} as asked; ask for less", "where")


def _shuffled(kept: Mapping[int, tuple[Place, Row]], seed: int) -> list[int]:
    """Return the numbers of rows in an order of their own, whatever order and form they came in."""

    def key(number: int) -> bytes:
        row = kept[number][1]
        told = json.dumps([seed, *(as_text(row.get(name)) for name in _ORDERED)])
        return hashlib.sha256(told.encode("utf-8", "surrogatepass")).digest()

    return sorted(kept, key=key)
