"""The rows of a run's metrics as its page takes them: numbers alone, one row an iteration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from flowalign.record.metrics import read_metrics
from flowalign.record.textfiles import inside

Row = Mapping[str, Any]
MOST_ITERATIONS = 10**12
WINDOW = 10  # rows whose mean stands for the beginning of a run, or for its end


def read_rows(run_dir: Path) -> list[Row]:
    """Return the rows with an iteration, in order; of an iteration that is there twice the later one.

    Of a row only the numbers and nulls are kept: the run may be somebody else's.
    """
    path = run_dir / "metrics.jsonl"
    found = read_metrics(path) if inside(path, run_dir) else []
    whole = [row for row in found if type(row.get("iteration")) is int and 0 <= row["iteration"] < MOST_ITERATIONS]
    by_iteration = {row["iteration"]: {key: value for key, value in row.items() if _counts(value)} for row in whole}
    return [by_iteration[iteration] for iteration in sorted(by_iteration)]


def _counts(value: Any) -> bool:
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < MOST_ITERATIONS)


def iterations(rows: Iterable[Row]) -> list[int]:
    """Return the iteration of each row."""
    return [row["iteration"] for row in rows]


def done(trained: Sequence[Row]) -> int:
    """Return the iterations that have been done, by the last row."""
    return trained[-1]["iteration"] if trained else 0


def finite(value: Any) -> float | None:
    """Return the value as a number; None where it is none, or not a finite one."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def known(rows: Iterable[Row], key: str) -> list[float]:
    """Return the finite values of ``key``."""
    return [value for row in rows if (value := finite(row.get(key))) is not None]


def mean(values: Sequence[float]) -> float | None:
    """Return the mean; None of nothing."""
    return sum(values) / len(values) if values else None


def wall_s(rows: Iterable[Row]) -> float | None:
    """Return the seconds of all starts of the run together; a start whose clock began anew is told by a fall."""
    clock = known(rows, "wall_s")
    if not clock:
        return None
    return clock[-1] + sum(last for last, then in pairwise(clock) if then < last)
