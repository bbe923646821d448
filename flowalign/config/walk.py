"""The noise levels of a walk in a configuration: types that refuse anything else in the user's words."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, WithJsonSchema

from flowalign.config.fields import Takes


def _known_grid(value: Any) -> Any:
    # Where the name of version 0.1 is still read, `walkcheck` knows.
    if value not in ("pipeline", "paper", "diffusers"):
        raise ValueError(f"got {value!r}; write pipeline or paper")
    return value


def _known_shift(value: Any) -> Any:
    if value is None or value == "auto":
        return value
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"got {value!r}; write a number above 0, auto or null")
    return number


# Levels of a walk: those of the model's own `pipeline`, or of the `paper`; `diffusers` is what 0.1 called its own
# static grid, read where 0.1 wrote it.
Grid = Annotated[
    Literal["pipeline", "paper", "diffusers"],
    BeforeValidator(_known_grid),
    Takes("`pipeline` or `paper`"),
    WithJsonSchema({"enum": ["pipeline", "paper"], "type": "string"}),
]
# Null is the model's own, `auto` that of its own resolution times the root of the size over the model's.
Shift = Annotated[
    float | Literal["auto"] | None, BeforeValidator(_known_shift), Takes("number above 0, `auto`, or null")
]
