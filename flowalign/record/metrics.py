"""metrics.jsonl, and its mirror in trackers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowalign.config.logging import LoggingConfig
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
        self,
        run_dir: Path,
        name: str,
        logging: LoggingConfig,
        *,
        keep_until: int | None = None,
        each: bool = True,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the file.

        ``keep_until`` drops rows of later iterations first, as a resume from that iteration needs. It says which rows
        before that iteration are missing, of ``each`` iteration or where there are none.

        A damaged file is kept as it is beside the new one, which has the rows that can be read. ``facts`` is the run's
        configuration, for the trackers.
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
        last = max((row["iteration"] for row in found), default=None)
        self._mirror = Mirror(run_dir, name, logging, kept=rows, recorded=last, facts=facts)

    def write(self, iteration: int, metrics: Mapping[str, float], *, wall_s: float) -> dict[str, Any]:
        """Write a row, whole or not at all. Raise DiskError."""
        row = {"iteration": iteration, "wall_s": round(wall_s, 3)}
        row |= {key: value if math.isfinite(value) else None for key, value in sorted(metrics.items())}
        append_line(self.path, json.dumps(row))
        self._mirror.log(row, iteration)
        return row

    def pictures(self, folder: Path, iteration: int) -> None:
        """Show the pictures of an evaluation, which lie in ``folder``, in the trackers; before the iteration's row."""
        self._mirror.pictures(folder, iteration)

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
