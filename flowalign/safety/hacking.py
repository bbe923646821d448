"""The alarm for a policy that has found a gap in its reward: the trained reward rises, a gold one falls."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

ALARM = "alarm/reward_hacking/"


class HackingAlarm:
    """Tells when the trained reward rises while a gold reward falls.

    Iterations are taken in blocks of ``window``. The last block is compared with the earlier one whose gold mean was
    highest: the alarm rings where the total is higher and gold lower, each by more than ``standard_errors`` of the
    difference. It follows from the metrics alone, so a resumed run continues it from ``rows``.
    """

    def __init__(
        self,
        gold: Sequence[str],
        rows: Sequence[Mapping[str, Any]] = (),
        *,
        window: int = 10,
        standard_errors: float = 4.0,
    ) -> None:
        self.gold, self.window, self.standard_errors = tuple(gold), window, standard_errors
        self._history: list[Mapping[str, Any]] = []
        for row in rows:
            self.update(row)

    def update(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Return ``alarm/reward_hacking/<gold>``, 0 or 1, once two blocks are there."""
        if not self.gold or "reward/total/mean" not in metrics:
            return {}
        self._history.append({key: metrics.get(f"reward/{key}/mean") for key in (*self.gold, "total")})
        return {f"{ALARM}{name}": float(self._rings(name)) for name in self.gold if self._blocks(name)}

    def _blocks(self, name: str) -> list[tuple[list[float], list[float]]]:
        """Return (total, gold) values block by block, counted back from the newest iteration."""
        usable = [(row["total"], row[name]) for row in self._history if _known(row["total"]) and _known(row[name])]
        first = len(usable) % self.window
        cut = [usable[i : i + self.window] for i in range(first, len(usable), self.window)]
        return [([t for t, _ in block], [g for _, g in block]) for block in cut] if len(cut) > 1 else []

    def _rings(self, name: str) -> bool:
        *earlier, (total, gold) = self._blocks(name)
        best_total, best_gold = max(earlier, key=lambda block: statistics.fmean(block[1]))
        return self._exceeds(total, best_total) and self._exceeds(best_gold, gold)

    def _exceeds(self, a: Sequence[float], b: Sequence[float]) -> bool:
        """Tell whether ``a``'s mean is above ``b``'s by more than so many standard errors of the difference."""
        error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
        return statistics.fmean(a) - statistics.fmean(b) > self.standard_errors * error


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(value)
