"""The prompts of a run: the rows of a source that are asked for, checked, in an order that no reader decides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from flowalign.config.prompts import HUB, SHAPES, Prompts, PromptsConfig
from flowalign.data.sources.place import Place, Row, Source
from flowalign.data.sources.read import FORMS, read_source, state_of
from flowalign.data.sources.rows import TEXTS, NoPrompt, as_text, check_row, has_no_prompt, row_filter, row_taker
from flowalign.record.textfiles import TextError, and_more
from flowalign.shapes import prompts as shapes

SHIPPED = ("shapes:train", "shapes:eval")
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
    if not asked.source.strip():
        raise SourceError(f"no source is named; give shapes:train, shapes:eval, {FORMS}")
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
    if source in SHIPPED and (split, subset, revision) != (None, None, None):
        raise TextError(f"{source} has neither split, subset nor revision; leave them out")
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
    keeps, take = row_filter(asked.where), row_taker(asked, source.folder)
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
            if "empty" in asked.drop and has_no_prompt(taken):
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
                if column in source.unread:
                    raise SourceError(_unread(asked.source, column, source.unread[column]), f"{key}.{name}")
                near = get_close_matches(column, known, n=1)
                said = f"did you mean {near[0]!r}?" if near else has
                raise SourceError(f"{asked.source} has no column {column!r}; {said}", f"{key}.{name}")
    if "prompt" in asked.columns and asked.columns["prompt"] is None:
        raise SourceError("is null, and prompts are what is read; name the column that holds them", "columns.prompt")
    if asked.columns.get("prompt") is None and "prompt" in source.unread:
        raise SourceError(_unread(asked.source, "prompt", source.unread["prompt"]))
    if asked.columns.get("prompt") is None and "prompt" not in known and known:
        likely = next((name for name in known if name.lower() in ("prompt", "prompts", *TEXTS)), "NAME")
        raise SourceError(
            f"{asked.source} has no column 'prompt'; {has}; say which one holds the prompts: "
            f"{{source: …, columns: {{prompt: {likely}}}}}"
        )


def _unread(source: str, column: str, kind: str) -> str:
    return f"{source} has {kind} in the column {column!r}, which is not read; save it as texts or numbers"


def _all_left_out(asked: PromptsConfig, source: Source, by_filter: int) -> SourceError:
    """Return what to say where no row is left, of which so many were left out ``by_filter``."""
    count = f"none of the {len(source.rows)} rows of {asked.source}"
    if by_filter < len(source.rows):
        return SourceError(
            f"{count} {'that `where` keeps ' * bool(by_filter)}has a prompt; `drop` leaves all out", "drop"
        )
    for column, wanted in asked.where.items():
        keeps, rows = (
            row_filter({column: wanted}),
            [(row, place) for place, row in source.rows if isinstance(row, dict)],
        )
        if not any(keeps(*row) for row in rows):
            known = list(dict.fromkeys(f"{as_text(row.get(column))!s:.80}" for row, _ in rows))
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
