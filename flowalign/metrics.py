"""metrics.jsonl, and its mirror in wandb (offline by default)."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowalign.config import LoggingConfig
from flowalign.mirror import Mirror

TIME_KEYS = ("wall_s", "time/", "throughput/")
RETRIES = "/retries"  # of a reward server: what its network did, not what the run computed


class MetricsWriter:
    """Appends one JSON object a line; NaN and Inf are written as null, so that every reader can parse it."""

    def __init__(self, run_dir: Path, name: str, logging: LoggingConfig, *, keep_until: int | None = None) -> None:
        """``keep_until``: drop rows of later iterations first, as a resume from that iteration needs."""
        self.path = run_dir / "metrics.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            rows = [row for row in read_metrics(self.path) if keep_until is not None and row["iteration"] <= keep_until]
            draft = self.path.with_suffix(".part")
            draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
            draft.replace(self.path)
        self._mirror = Mirror(run_dir, name, logging)

    def write(self, iteration: int, metrics: Mapping[str, float], *, wall_s: float) -> dict[str, Any]:
        row = {"iteration": iteration, "wall_s": round(wall_s, 3)}
        row |= {key: value if math.isfinite(value) else None for key, value in sorted(metrics.items())}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._mirror.log({k: v for k, v in row.items() if v is not None}, step=iteration)
        return row

    def close(self) -> None:
        self._mirror.close()


class Clock:
    """Wall time of an iteration's phases; idle is the time of a collection in which no rollout worker worked."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._laps[name] = now - self._last
        self._last = now

    def metrics(self, rollout_s: float, score_s: float, num_images: int) -> dict[str, float]:
        """``time/*`` and ``throughput/*``; the seconds of work are means over the workers of a kind."""
        total = time.monotonic() - self._began
        times = {"rollout_s": rollout_s, "score_s": score_s, **self._laps, "iteration_s": total}
        times["idle_s"] = max(0.0, self._laps["collect_s"] - rollout_s)
        return {f"time/{k}": v for k, v in times.items()} | {"throughput/images_per_s": num_images / total}


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
        """``alarm/reward_hacking/<gold>``, 0 or 1, once two blocks are there."""
        if not self.gold or "reward/total/mean" not in metrics:
            return {}
        self._history.append({key: metrics.get(f"reward/{key}/mean") for key in (*self.gold, "total")})
        return {f"{ALARM}{name}": float(self._rings(name)) for name in self.gold if self._blocks(name)}

    def _blocks(self, name: str) -> list[tuple[list[float], list[float]]]:
        """(total, gold) values block by block, counted back from the newest iteration."""
        usable = [(row["total"], row[name]) for row in self._history if _known(row["total"]) and _known(row[name])]
        first = len(usable) % self.window
        cut = [usable[i : i + self.window] for i in range(first, len(usable), self.window)]
        return [([t for t, _ in block], [g for _, g in block]) for block in cut] if len(cut) > 1 else []

    def _rings(self, name: str) -> bool:
        *earlier, (total, gold) = self._blocks(name)
        best_total, best_gold = max(earlier, key=lambda block: statistics.fmean(block[1]))
        return self._exceeds(total, best_total) and self._exceeds(best_gold, gold)

    def _exceeds(self, a: Sequence[float], b: Sequence[float]) -> bool:
        """Whether the mean of ``a`` is above that of ``b`` by more than so many standard errors of the difference."""
        error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
        return statistics.fmean(a) - statistics.fmean(b) > self.standard_errors * error


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file, none where it is missing; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what may differ between equal runs."""
    return {key: value for key, value in row.items() if not key.startswith(TIME_KEYS) and not key.endswith(RETRIES)}
