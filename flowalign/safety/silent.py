"""Scores that are trained on and never come: a part that is NaN on every image is no failure, and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class SilentScores:
    """Tells, once, which scores were no number on any image of a run's first ``block`` of iterations.

    It follows from the metrics alone, so a resumed run goes on from its ``rows``.
    """

    def __init__(self, block: int, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        self._left = block
        self._known: set[str] = set()
        for row in rows:
            self._take(row)

    def update(self, metrics: Mapping[str, Any], trained: Iterable[str]) -> list[str]:
        """Return the ``trained`` scores without a number so far where the block ends with this iteration."""
        self._take(metrics)
        return [] if self._left else [name for name in trained if _mean(name) not in self._known]

    def _take(self, metrics: Mapping[str, Any]) -> None:
        if _mean("total") not in metrics:
            return
        self._left -= 1
        values = {key: value for key, value in metrics.items() if key.startswith("reward/") and key.endswith("/mean")}
        self._known |= {key for key, value in values.items() if value is not None and math.isfinite(value)}


def _mean(name: str) -> str:
    return f"reward/{name}/mean"
