"""What an examination of a model finds: one line each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flowalign.export.verify import TOLERANCE, unexplained


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


def judged(name: str, said: str, share: float, advice: str, rounding: float = 0.0, **figures: Any) -> Check:
    """Return the check of a difference, a ``share`` of the largest value; what is no number fails.

    ``rounding`` is how far a rounding of its noise moves a walk.
    """
    within = unexplained(share, rounding) <= TOLERANCE
    far = "" if within else f", more than {TOLERANCE:g}"
    if rounding:
        far += f"{' and' if far else ', as'} what a rounding of the noise makes, {rounding:.1e}"
    text = f"{said}: equal" if share == 0 else f"{said}: {share:.1e} of the largest value apart{far}"
    figures |= {"apart": share, "rounding": rounding}
    return Check("ok" if within else "fail", name, text, "" if within else advice, figures)
