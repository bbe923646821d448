"""What an examination of a model finds: one line each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TOLERANCE = 1e-5  # of the largest value, in float32


@dataclass(frozen=True)
class Check:
    """One line: a ``fact`` that was read, or a comparison that went ``ok``, ``fail`` or was left out (``skip``).

    ``advice`` is what to do about a failure, ``figures`` what was measured or read.
    """

    status: Literal["fact", "ok", "fail", "skip"]
    name: str
    said: str
    advice: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


Tell = Callable[[Check], None]


def judged(name: str, said: str, share: float, advice: str, **figures: Any) -> Check:
    """Return the check of a difference, a ``share`` of the largest value; what is no number fails."""
    within = share <= TOLERANCE
    far = "" if within else f", more than {TOLERANCE:g}"
    text = f"{said}: equal" if share == 0 else f"{said}: {share:.1e} of the largest value apart{far}"
    return Check("ok" if within else "fail", name, text, "" if within else advice, {"apart": share, **figures})
