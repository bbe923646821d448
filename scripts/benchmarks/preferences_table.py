"""The table of scripts/benchmarks/preferences.py, from its JSON files alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cells import GOLD, OFFICIAL, ROOT, STRICT, as_markdown
from preferences_cells import CELLS

PAGE = ROOT / "docs" / "algorithms.md"
MARKS = "<!-- preferences: scripts/benchmarks/preferences.py table -->", "<!-- end of preferences -->"
Cell = Mapping[str, Any]
WORTH = {"+": 1.0, "=": 0.5, "-": 0.0}


def load(directory: Path) -> dict[str, list[Cell]]:
    """The finished cells by name, each with its seeds, the highest win rate first."""
    cells: dict[str, list[Cell]] = {}
    for path in sorted(directory.glob("*-seed*.json")):
        cell = json.loads(path.read_text())
        cells.setdefault(cell["cell"], []).append(cell)
    return dict(sorted(cells.items(), key=lambda item: -worth(item[1]).mean()))


def worth(cells: Sequence[Cell]) -> np.ndarray:
    """What the aligned model won at each sample under each seed, (S, N)."""
    return np.array([[WORTH[outcome] for outcome in cell["outcomes"]] for cell in cells])


def wilson(wins: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a proportion (Wilson 1927)."""
    p, scale = wins / count, 1 + z * z / count
    middle, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return (middle - half) / scale, (middle + half) / scale


def resampled(outcomes_SN: np.ndarray, draws: int = 10000) -> tuple[float, float]:
    """Interval of the mean outcome over seeds and samples: percentiles over resampled columns."""
    means = outcomes_SN.mean(0)
    index = np.random.default_rng(0).integers(0, len(means), (draws, len(means)))
    low, high = np.percentile(means[index].mean(1), [2.5, 97.5])
    return float(low), float(high)


def interval(outcomes_SN: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the win rate: of one seed Wilson's, of several by resampling."""
    if len(outcomes_SN) > 1:
        return resampled(outcomes_SN)
    return wilson(outcomes_SN.sum(), outcomes_SN.shape[1])


def markdown(directory: Path) -> str:
    """A row a cell, means over seeds, and the base that all are compared with."""
    head = ["cell", "seeds", "won, %", "95 % interval", "by seed", "draws, %"]
    head += ["strict", "official", "PickScore", "pairs told apart"]
    rows = [_base(directory / "base.json")] if (directory / "base.json").exists() else []
    return as_markdown(head, [*rows, *(_row(name, cells) for name, cells in load(directory).items())])


def _base(path: Path) -> list[str]:
    base = json.loads(path.read_text())
    return ["base", "", "", "", "", "", *_scores([base]), ""]


def _row(name: str, cells: Sequence[Cell]) -> list[str]:
    won = worth(cells)
    low, high = (f"{100 * end:.1f}" for end in interval(won))
    by_seed = ", ".join(f"{100 * rate:.1f}" for rate in won.mean(1)) if len(cells) > 1 else ""
    rates = [f"{100 * won.mean():.1f}", f"{low} to {high}", by_seed, f"{100 * (won == WORTH['=']).mean():.1f}"]
    apart = statistics.fmean(cell["learned"]["dpo/implicit_accuracy"] for cell in cells)
    return [CELLS[name].title, str(len(cells)), *rates, *_scores(cells), f"{apart:.2f}"]


def _scores(cells: Sequence[Cell]) -> list[str]:
    """Strict GenEval with its standard error, that of one seed's samples; the official one; PickScore."""

    def mean(key: str, of: str = "metrics") -> float:
        return statistics.fmean(cell[of][key] for cell in cells)

    error = mean(STRICT.replace("eval/", "standard_error/"), "standard_errors")
    return [f"{mean(STRICT):.3f} ± {error:.3f}", f"{mean(OFFICIAL):.3f}", f"{mean(GOLD):.2f}"]
