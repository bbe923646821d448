"""Overrides of a configuration, key=value, as if they were written in its file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from flowalign.config.section import ConfigError
from flowalign.record.textfiles import DEEPEST
from flowalign.record.yamlfiles import KINDS, LONGEST_KEY, Mapping, check_finite, parse_with_text, parse_yaml


def override(raw: dict[str, Any], assignments: Sequence[str]) -> None:
    """Apply ``a.b.0.c=value`` in place; values are YAML.

    A mapping is merged key by key into one that is there, unless its ``type``, ``kind`` or ``spec`` is another; a list
    and a null replace what is there.
    """
    for index, assignment in enumerate(assignments):
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip() or key != key.strip():
            raise ConfigError("", f"override {assignment!r:.200} is not key=value, {_spaced(assignments[index:])}")
        if key.count(".") >= DEEPEST or len(key) > LONGEST_KEY:
            raise ConfigError("", f"override {key[:60]}… names no key; none is as long")
        _assign(raw, key, *parse_with_text(value, f"the value of {key}", key))


def _spaced(words: Sequence[str]) -> str:
    """Return what to write in the place of ``key = value``, which a shell hands over as one, two or three words."""
    key, equals, value = (part.strip() for part in " ".join(words[:3]).partition("="))
    first = words[0].strip()
    meant = bool(key) and " " not in key and (key == first or first in (f"{key}=", key) or "=" in first)
    return f"without spaces: write {key}={value.split(' ')[0]}" if equals and meant else "such as learner.epochs=2"


def _assign(raw: dict[str, Any], key: str, value: Any, text: str | None) -> None:
    *parents, last = key.split(".")
    here: Any = raw
    for depth, part in enumerate(parents):
        at = ".".join(parents[:depth])
        if isinstance(here, list):
            here = here[_index(here, part, at, key)]
            continue
        if here.get(part) is None:
            here[part] = Mapping()
        here = here[part]
        if not isinstance(here, dict | list):
            raise ConfigError(key, f"{'.'.join(parents[: depth + 1])} is {here!r}, which has no keys inside")
    place: Any = _index(here, last, ".".join(parents), key) if isinstance(here, list) else last
    there = here[place] if isinstance(here, list) else here.get(place)
    if isinstance(value, dict) and isinstance(there, dict) and not _is_another(there, value):
        if there and not value:
            raise ConfigError(key, f"{{}} adds nothing to what is there; {key}=null takes it out")
        _merge(there, value)
        return
    here[place] = value
    _note(here, place, text)


def _merge(there: dict[Any, Any], new: dict[Any, Any]) -> None:
    for key, value in new.items():
        old = there.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and not _is_another(old, value):
            _merge(old, value)
        else:
            there[key] = value
            _note(there, key, getattr(new, "texts", {}).get(key))


def _note(container: Any, key: Any, text: str | None) -> None:
    """Keep what was written for a value beside it."""
    texts = getattr(container, "texts", None)
    if texts is not None:
        texts.pop(key, None)
        texts |= {} if text is None else {key: text}


def _is_another(old: dict[Any, Any], new: dict[Any, Any]) -> bool:
    return any(key in new and new[key] != old.get(key, new[key]) for key in KINDS)


def _index(items: list[Any], part: str, at: str, key: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(items):
        raise ConfigError(key, f"{at} is a list of {len(items)}; write an index from 0 to {len(items) - 1}")
    return int(part)


def scalar_options(assignments: Sequence[str]) -> dict[str, Any]:
    """Parse ``key=value`` options given on a command line.

    Values are JSON, YAML's numbers and truth values, or text.
    """
    from rewards.resolve import options_of

    without = next((assignment for assignment in assignments if "=" not in assignment), None)
    if without is not None:
        raise ConfigError(without, "is no option; write key=value")
    options = options_of(assignments, _scalar)
    check_finite(options)
    return options


def _scalar(text: str) -> Any:
    """Return the value as a configuration would read it, where it is one number, ``true`` or the like.

    Otherwise return the text as it is.
    """
    try:
        value = parse_yaml(text, "it")
    except ConfigError:
        return text
    return value if isinstance(value, bool | int | float) else text
