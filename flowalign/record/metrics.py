"""metrics.jsonl, and its mirror in wandb (offline by default)."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowalign.config.sections import LoggingConfig
from flowalign.record.disk import append_line, draft_of, write_text
from flowalign.record.log import say_once
from flowalign.record.mirror import Mirror

TIME_KEYS = ("wall_s", "time/", "throughput/")
NAMED = 5
FIRST = b'{"iteration"'  # how each row begins
FAULTS = ("/retries", "/restarts")  # what a network or a machine did, not what the run computed


class MetricsWriter:
    """Appends one JSON object a line; NaN and Inf are written as null, so that every reader can parse it."""

    def __init__(
        self, run_dir: Path, name: str, logging: LoggingConfig, *, keep_until: int | None = None, each: bool = True
    ) -> None:
        """Open the file.

        ``keep_until`` drops rows of later iterations first, as a resume from that iteration needs. It says which rows
        before that iteration are missing, of ``each`` iteration or where there are none.

        A damaged file is kept as it is beside the new one, which has the rows that can be read.
        """
        self.path = run_dir / "metrics.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        found, damage = ([], None) if keep_until is None else read_damaged(self.path)
        rows = [row for row in found if keep_until is not None and row["iteration"] <= keep_until]
        if hole := _hole(rows, keep_until or 0, each):
            say_once(f"{self.path}: {hole}; the run goes on, and its report and alarms know nothing of them")
        if self.path.exists():
            if damage is not None:
                say_once(f"{damage}; the file is kept as {_kept(self.path).name}")
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self._mirror = Mirror(run_dir, name, logging)

    def write(self, iteration: int, metrics: Mapping[str, float], *, wall_s: float) -> dict[str, Any]:
        """Write a row, whole or not at all. Raise DiskError."""
        row = {"iteration": iteration, "wall_s": round(wall_s, 3)}
        row |= {key: value if math.isfinite(value) else None for key, value in sorted(metrics.items())}
        append_line(self.path, json.dumps(row))
        self._mirror.log({k: v for k, v in row.items() if v is not None}, step=iteration)
        return row

    def close(self) -> None:
        self._mirror.close()


def _hole(rows: Sequence[Mapping[str, Any]], last: int, each: bool) -> str | None:
    """Say which of the rows up to ``last`` are missing."""
    there = {row["iteration"] for row in rows}
    missing = sorted(set(range(1, last + 1)) - there)
    if not missing or (there and not each):
        return None
    ends = f"row {missing[0]} is" if len(missing) == 1 else f"{len(missing)} rows of {missing[0]} to {missing[-1]} are"
    return f"{ends} missing"


def _kept(path: Path) -> Path:
    """Copy ``path`` to a name that is free, and return that."""
    number = 1
    while (kept := path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")).exists():
        number += 1
    with draft_of(kept, needed=path.stat().st_size) as draft:
        shutil.copy2(path, draft)
    return kept


class Clock:
    """Wall time of an iteration's phases; idle is the time of a collection in which no rollout worker worked."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._laps[name] = now - self._last
        self._last = now

    def metrics(self, rollout_s: float, score_s: float, num_images: int | None = None) -> dict[str, float]:
        """Return ``time/*``, and ``throughput/*`` where images were made; seconds of work are means over workers."""
        total = time.monotonic() - self._began
        times = {"rollout_s": rollout_s, "score_s": score_s, **self._laps, "iteration_s": total}
        times["idle_s"] = max(0.0, self._laps["collect_s"] - rollout_s)
        speed = {} if num_images is None else {"throughput/images_per_s": num_images / total}
        return {f"time/{k}": v for k, v in times.items()} | speed


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


@dataclass(frozen=True)
class Damage:
    """The lines of a metrics file that hold no row, counted from 1."""

    path: Path
    lines: tuple[int, ...]

    def __str__(self) -> str:
        named = ", ".join(map(str, self.lines[:NAMED]))
        more = f" and {len(self.lines) - NAMED} more" if len(self.lines) > NAMED else ""
        return f"{self.path}, line{'s' * (len(self.lines) > 1)} {named}{more}: damaged, no row can be read there"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics file, none where it is missing; a last line that a kill cut short is left out.

    What is damaged is said, once, and the rows around it are kept.
    """
    rows, damage = read_damaged(path)
    if damage is not None:
        say_once(str(damage))
    return rows


def read_damaged(path: Path) -> tuple[list[dict[str, Any]], Damage | None]:
    """Read the rows as `read_metrics`, and say what is damaged."""
    *whole, cut = path.read_bytes().split(b"\n") if path.exists() else [b""]
    rows, lines = [], []
    for number, line in enumerate(whole, start=1):
        row = _row(line)
        if row is None and line.strip():
            lines.append(number)
            row = _row(line[line.rfind(FIRST) :]) if FIRST in line else None  # a row written behind half of another
        rows += [] if row is None else [row]
    last = _row(cut)
    return rows + ([] if last is None else [last]), Damage(path, tuple(lines)) if lines else None


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("iteration")) is int else None


def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without what may differ between equal runs."""
    return {key: value for key, value in row.items() if not key.startswith(TIME_KEYS) and not key.endswith(FAULTS)}
