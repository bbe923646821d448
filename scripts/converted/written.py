"""Keys with their values and reasons, as a YAML file that a person reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

WIDTH = 120
COLUMN = 32  # where the reasons of short lines begin


@dataclass(frozen=True)
class Line:
    """A key of ours, by its dots, its value, and what a reader has to know of it."""

    key: str
    value: Any
    why: str = ""


def yaml_of(head: Sequence[str], lines: Sequence[Line], left: Sequence[str]) -> str:
    """Return the text of a configuration: comments, keys in the order of ``lines``, and last what has no key."""
    nested: dict[str, Any] = {}
    for line in lines:
        *sections, key = line.key.split(".")
        section = nested
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = line
    parts = [*(f"# {line}".rstrip() for line in head), *_written(nested, "")]
    if left:
        parts += ["", "# Without a key here:", *(f"#   {line}" for line in left)]
    return "\n".join(parts) + "\n"


def _written(section: Mapping[str, Any], indent: str) -> Iterator[str]:
    for key, found in section.items():
        if not isinstance(found, Line):
            yield from [f"{indent}{key}:"] if indent else ["", f"{key}:"]
            yield from _written(found, indent + "  ")
            continue
        inside = plain(found.value)
        if len(inside) > 1 or inside[0].startswith("- "):
            yield from ["", f"{key}:"] if not indent else [f"{indent}{key}:"]
            yield from (f"{indent}  {line}" for line in inside)
            yield from _reasons(found.why, f"{indent}  ")
            continue
        line = f"{indent}{key}: {inside[0]}"
        if found.why and len(line) < COLUMN and COLUMN + len(found.why) + 2 <= WIDTH:
            yield f"{line:<{COLUMN}}# {found.why}"
        else:
            yield from _reasons(found.why, indent)
            yield line


def _reasons(why: str, indent: str) -> Iterator[str]:
    """Break a reason into comments of a line each."""
    words, line = why.split(), ""
    for word in words:
        if line and len(indent) + len(line) + len(word) + 3 > WIDTH:
            yield f"{indent}# {line}"
            line = ""
        line = f"{line} {word}".strip()
    if line:
        yield f"{indent}# {line}"


def plain(value: Any) -> list[str]:
    """Write a value, what holds no further mapping or list on one line."""
    text = yaml.safe_dump(value, default_flow_style=None, sort_keys=False, width=WIDTH, allow_unicode=True)
    return text.removesuffix("...\n").splitlines()
