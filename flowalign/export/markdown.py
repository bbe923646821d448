"""Text from outside in a model card: shown as it is, neither Markdown nor HTML."""

from __future__ import annotations

import json
import re
from typing import Any

from rewards.printable import printable

# A low line inside a word is none that Markdown reads; `://` would become a link.
_ACTIVE = re.compile(r"[\\`*\[\]<>|~&$#{}!]|:(?=//)|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def text(value: object) -> str:
    """Escape a value for a sentence or for the cell of a table."""
    return _ACTIVE.sub(r"\\\g<0>", printable(str(value)))


def code(value: object, *, cell: bool = True) -> str:
    """Set a value in type of one width.

    In the ``cell`` of a table ``|`` is written as GitHub's Markdown wants it there.
    """
    shown = printable(str(value)) or " "
    shown = shown.replace("|", r"\|") if cell else shown
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def front(value: Any) -> str:
    """Write a value for front matter: as JSON, which YAML contains, of texts that YAML may hold."""
    return json.dumps(_printable(value), ensure_ascii=False)


def _printable(value: Any) -> Any:
    if isinstance(value, dict):
        return {printable(str(key)): _printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(item) for item in value]
    return printable(value) if isinstance(value, str) else value
