"""Renames: what an older checkout calls otherwise, in a configuration, a metric, a file or a command line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Rename:
    """What was called ``old`` is called ``new``. A ``key`` is one of configurations and of what records them
    (``model.family``); it is found wherever these parts follow one another, and ``values`` renames what it holds. A
    ``metric`` is a key of metrics.jsonl, a ``file`` a part of a path, an ``option`` one of the command line.
    """

    kind: Literal["key", "metric", "file", "option", "tensor"]
    old: str
    new: str
    values: tuple[tuple[Any, Any], ...] = ()
    training: bool = False  # a key of trainings on latents alone


def renamed_key(key: Key, renames: Sequence[Rename], *, back: bool = False) -> Key:
    """``key`` in the newest words, or ``back`` in the older ones."""
    for rename in reversed(renames) if back else renames:
        old, new = (rename.new, rename.old) if back else (rename.old, rename.new)
        if rename.kind == "metric" and key[-1:] == (old,):
            key = (*key[:-1], new)
        if rename.kind != "key":
            continue
        parts, others = tuple(old.split(".")), tuple(new.split("."))
        for start in range(len(key) - len(parts) + 1):
            end = start + len(parts)
            newest = not back and key[max(0, end - len(others)) : end] == others
            if key[start:end] == parts and not newest:
                key = key[:start] + others + key[end:]
                break
    return key


def renamed_value(key: Key, value: Any, renames: Sequence[Rename], *, back: bool = False) -> Any:
    """``value`` of a ``key`` in the newest words, in the newest words too, or ``back`` in the older ones."""
    for rename in renames:
        parts = tuple(rename.new.split("."))
        if rename.kind == "key" and key[-len(parts) :] == parts:
            for old, new in rename.values:
                if value == (new if back else old):
                    return old if back else new
    return value


def flat(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Each leaf of mappings and lists with its key; an empty one is a leaf."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from flat(inner, (*key, name))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for index, inner in enumerate(value):
            yield from flat(inner, (*key, index))
    else:
        yield key, value


def in_older_words(content: Any, renames: Sequence[Rename]) -> Any:
    """A configuration's ``content`` with its keys and values in the words of an older checkout."""
    if isinstance(content, list):
        return [in_older_words(inner, renames) for inner in content]
    if not isinstance(content, Mapping):
        return content
    out: dict[Any, Any] = {}
    for key, value in _branches(content):
        place, old = out, renamed_key(key, renames, back=True)
        for part in old[:-1]:
            place = place.setdefault(part, {})
        value = renamed_value(key, value, renames, back=True)
        place[old[-1]] = [in_older_words(inner, renames) for inner in value] if isinstance(value, list) else value
    return out


def _branches(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _branches(inner, (*key, name))
    else:
        yield key, value


def older_line(line: Sequence[str], renames: Sequence[Rename]) -> list[str]:
    """The words of a command line, overrides too, in those of an older checkout."""
    out = []
    for word in line:
        for rename in renames:
            if rename.kind == "option" and word == rename.new:
                word = rename.old
        if override := re.fullmatch(r"([a-z_]+(?:\.[a-z_0-9]+)*)=(.*)", word):
            key = tuple(override[1].split("."))
            value = renamed_value(key, override[2], renames, back=True)
            word = f"{'.'.join(renamed_key(key, renames, back=True))}={value}"
        out.append(word)
    return out
