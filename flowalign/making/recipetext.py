"""The YAML of a configuration that is written for people: small, a section after the other, reasons behind values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from flowalign.record.yamlfiles import parse_yaml, plain

Choices = dict[str, tuple[Any, str]]  # by dotted key: the value, and why it is that one
_BARE = re.compile(r"[\w./~-][\w./~:+-]*")
_BEHIND = 26  # columns, from which reasons stand behind short values
_WIDTH = 120


def raw_of(choices: Choices) -> dict[str, Any]:
    """Return the configuration that the choices are."""
    raw: dict[str, Any] = {}
    for key, (value, _) in choices.items():
        *sections, name = key.split(".")
        place = raw
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return raw


def text_of(choices: Choices, header: Sequence[str]) -> str:
    """Return the choices as YAML below a ``header`` of comments; a list has an item a line."""
    lines = ["# " + re.sub(r"[\r\n]", " ", line) for line in header]
    for section in dict.fromkeys(key.partition(".")[0] for key in choices):
        own = {key: choice for key, choice in choices.items() if key.partition(".")[0] == section}
        if section not in own:
            lines += ["", f"{section}:"]
            for key, (value, why) in own.items():
                lines += _lines(f"  {key.partition('.')[2]}: {written(value)}", why)
        elif isinstance(own[section][0], list):
            lines += ["", *_lines(f"{section}:", own[section][1])]
            lines += [f"  - {written(item)}" for item in own[section][0]]
        else:
            lines += _lines(f"{section}: {written(own[section][0])}", own[section][1])
    return "\n".join(lines) + "\n"


def _lines(text: str, why: str) -> list[str]:
    """Return a line with its reason, which stands above where there is no room behind."""
    line = f"{text:<{_BEHIND}}  # {why}" if why else text
    if len(line) <= _WIDTH or not why:
        return [line]
    return [f"{' ' * (len(text) - len(text.lstrip()))}# {why}", text]


def written(value: Any) -> str:
    """Write a value in one line, so that it is read back as it is."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{written(key)}: {written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    if isinstance(value, str):
        bare = _BARE.fullmatch(value) and not value.endswith(":")
        return value if bare and plain(parse_yaml(value, value)) == value else _quoted(value)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        short = f"{value:.1e}"
        return re.sub(r"e-0*", "e-", short if float(short) == value else f"{value:.16e}")
    return repr(value)


def _quoted(text: str) -> str:
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in text) + '"'
