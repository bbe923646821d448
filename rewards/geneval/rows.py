"""GenEval's rows: ``tag``, ``include``, ``exclude``; read in one way, and checked before anything is drawn.

``{"tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "color": "red",
"position": ["left of", 0]}], "prompt": …}``: a position is a relation and the index of an earlier include clause.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from rewards.interface import InputError, Metadata

RELATIONS = ("left of", "right of", "above", "below")
CLAUSE = ("class", "count", "color", "position")
_LISTED = 12
_FORM = "geneval needs rows in GenEval's form, with tag, include and prompt"


def canonical(name: str) -> str:
    """Return a name of a class, a colour or a relation as it is compared: ``Star`` is ``star``."""
    return " ".join(name.casefold().split())


def clauses_of(metadata: Mapping[str, Any], part: str = "include") -> list[dict[str, Any]]:
    """Return the clauses of a row in one spelling; a key that is null, as tables write it, is left out.

    Raises:
        InputError: they are not in GenEval's form.
    """
    listed = metadata.get(part)
    if listed is None:
        return []
    if not isinstance(listed, list):
        raise InputError(f"metadata: {part} is a {type(listed).__name__}; write a list of clauses")
    return [_clause(f"{part}[{index}]", clause, index) for index, clause in enumerate(listed)]


def colored_classes(metadata: Mapping[str, Any]) -> set[str]:
    """Return the classes for which a row asks for a colour."""
    return {canonical(clause["class"]) for clause in metadata.get("include") or () if clause.get("color") is not None}


def read_row(metadata: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (include, exclude) of a row. Raise InputError where it is not in GenEval's form."""
    if not isinstance(metadata, Mapping) or not metadata.get("include"):
        prompt = metadata.get("prompt", "") if isinstance(metadata, Mapping) else metadata
        raise InputError(f"the row of prompt {str(prompt)[:60]!r} has no `include` list; {_FORM}")
    return clauses_of(metadata, "include"), clauses_of(metadata, "exclude")


def check_row(
    metadata: Metadata, classes: Collection[str] | None, colors: Collection[str] | None, judge: str, most: int = 16
) -> None:
    """Raise InputError for a row that ``judge``, who knows ``classes`` and ``colors`` (None: any), could never judge.

    That is one of another form, or one that no image fulfils: with a class, a colour or a relation that is not known,
    more than the ``most`` objects of a class that are kept, or a number that is wanted and excluded.
    """
    if not isinstance(metadata.get("tag"), str) or not metadata["tag"]:
        raise InputError(f"has no `tag`; {_FORM}")
    _check_keys("the row", metadata, ("tag", "include", "exclude"))
    for part, clauses in zip(("include", "exclude"), read_row(metadata), strict=True):
        for index, clause in enumerate(clauses):
            _check_keys(f"{part}[{index}]", clause, CLAUSE)
    check_names(metadata, classes, colors, judge)
    _check_counts(metadata, most)


def _check_counts(metadata: Metadata, most: int) -> None:
    include, exclude = read_row(metadata)
    for index, clause in enumerate(include):
        if clause["count"] > most:
            raise InputError(
                f"include[{index}].count is {clause['count']}, and at most {most} objects of a class count"
            )
    for index, clause in enumerate(exclude):
        wanted = [one["count"] for one in include if one["class"] == clause["class"]]
        if wanted and max(wanted) >= clause["count"]:
            raise InputError(
                f"exclude[{index}] forbids {clause['count']} of {clause['class']} and more, of which include wants "
                f"{max(wanted)}; no image has both"
            )


def check_names(
    metadata: Metadata, classes: Collection[str] | None, colors: Collection[str] | None, judge: str
) -> None:
    """Raise InputError for a class, a colour or a relation that ``judge`` does not know."""
    for part, clauses in zip(("include", "exclude"), read_row(metadata), strict=True):
        for index, clause in enumerate(clauses):
            where = f"{part}[{index}]"
            if classes is not None:
                _check_name(f"{where}.class", clause["class"], classes, judge)
            if "color" in clause and colors is not None:
                _check_name(f"{where}.color", clause["color"], colors, judge)
            if "position" in clause:
                _check_name(f"{where}.position", clause["position"][0], RELATIONS, "geneval")


def _clause(where: str, given: Any, index: int) -> dict[str, Any]:
    if not isinstance(given, Mapping) or not isinstance(given.get("class"), str) or not given["class"].strip():
        raise InputError(f"metadata: {where} has no `class`; write {{class: circle, count: 1}}")
    clause = {key: value for key, value in given.items() if value is not None}
    count = clause.get("count")
    if type(count) is not int or count < 1:
        raise InputError(f"metadata: {where}.count is {count!r}; write an integer of at least 1")
    clause["class"] = canonical(clause["class"])
    if "color" in clause:
        if not isinstance(clause["color"], str):
            raise InputError(f"metadata: {where}.color is {clause['color']!r}; write the name of one colour")
        clause["color"] = canonical(clause["color"])
    if "position" in clause:
        clause["position"] = _position(where, clause["position"], index)
    return clause


def _position(where: str, position: Any, index: int) -> tuple[str, int]:
    if isinstance(position, list | tuple) and len(position) == 2:
        relation, target = position
        if isinstance(relation, str) and type(target) is int and 0 <= target < index:
            return canonical(relation), target
    raise InputError(
        f"metadata: {where}.position is {position!r}; write [relation, index of an earlier include clause]"
    )


@lru_cache(maxsize=1024)
def _meant(key: str, known: tuple[str, ...]) -> str | None:
    return next(iter(get_close_matches(key.casefold(), known, n=1, cutoff=0.8)), None)


def _check_keys(where: str, given: Collection[str], known: tuple[str, ...]) -> None:
    """Refuse a key that is one letter from a known one: it was meant to be judged."""
    for key in given:
        near = None if key in known else _meant(str(key), known)
        if near is not None and near not in given:
            raise InputError(f"{where} has the key {key!r}; did you mean {near!r}?")


def _check_name(where: str, name: str, known: Collection[str], judge: str) -> None:
    if name in known:
        return
    names = [canonical(one) for one in known]
    if name in names:
        return
    if not names:
        raise InputError(f"{where} is {name!r}, and {judge} tells no colours; give it `clip`, or leave the colour out")
    near = [one for one in names if name in one.split()] or get_close_matches(name, names, n=1, cutoff=0.7)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names[:_LISTED])}{more}"
    raise InputError(f"{where} is {name!r}, which {judge} does not know; {hint}")
