"""The table of scripts/benchmarks/preferences.py, from its JSON files alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from alignments import without
from cells import GOLD, OFFICIAL, ROOT, STRICT, alike, as_markdown, finished, read
from preferences_cells import CELLS
from scipy import stats

from flowalign.measure.clustered import clustered_mean
from flowalign.shapes.prompts import evaluation_set

PAGE = ROOT / "docs" / "algorithms.md"
MARKS = "<!-- preferences: scripts/benchmarks/preferences.py table -->", "<!-- end of preferences -->"
Cell = Mapping[str, Any]
WORTH = {"+": 1.0, "=": 0.5, "-": 0.0}


def load(directory: Path) -> dict[str, list[Cell]]:
    """The finished cells by name, each with its seeds, the highest win rate first.

    All must be of one base and one configuration, with as many pairs, and be judged by the same samples.
    """
    there = finished(directory, CELLS, "outcomes", "pairs", "learned", "metrics")
    alike(there, directory, "base", "samples")
    varied = {key for cell in there for key in cell["overrides"]}
    said = [{"settings": without(cell["settings"], varied)} for cell in there if "settings" in cell]
    alike(said, directory, "settings")
    alike([{"pairs": cell["pairs"]["count"]} for cell in there], directory, "pairs")
    cells: dict[str, list[Cell]] = {}
    for cell in there:
        cells.setdefault(cell["cell"], []).append(cell)
    return dict(sorted(cells.items(), key=lambda item: -worth(item[1]).mean()))


def worth(cells: Sequence[Cell]) -> np.ndarray:
    """What the aligned model won at each sample under each seed, (S, N)."""
    return np.array([[WORTH[outcome] for outcome in cell["outcomes"]] for cell in cells])


def interval(outcomes_SN: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the win rate by prompts, within each task; NaN where a task has fewer than two of them.

    Samples of one prompt are won and lost together, so that they are not so many draws. Seeds share prompts and noise:
    what varies is the mean over them.
    """
    rows = evaluation_set(outcomes_SN.shape[1])
    prompts, tasks = ([row[key] for row in rows] for key in ("prompt", "tag"))
    mean = clustered_mean(outcomes_SN.mean(0), prompts, tasks)
    half = float(stats.t.ppf(0.975, mean.degrees)) * mean.standard_error
    return mean.value - half, mean.value + half


def markdown(directory: Path) -> str:
    """A row a cell, means over seeds, and the base that all are compared with."""
    head = ["cell", "seeds", "won, %", "95 % interval", "by seed", "draws, %"]
    head += ["strict", "official", "PickScore", "pairs told apart"]
    by_name, rows = load(directory), []
    if (path := directory / "base.json").exists():
        base = read(path, "metrics", "standard_errors")
        alike([base, *(cell for cells in by_name.values() for cell in cells)], directory, "base", "samples")
        rows = [_base(base)]
    return as_markdown(head, [*rows, *(_row(name, cells) for name, cells in by_name.items())])


def _base(base: Cell) -> list[str]:
    return ["base", "", "", "", "", "", *_scores([base]), ""]


def _row(name: str, cells: Sequence[Cell]) -> list[str]:
    won = worth(cells)
    low, high = interval(won)
    between = "–" if math.isnan(low) else f"{100 * low:.1f} to {100 * high:.1f}"
    by_seed = ", ".join(f"{100 * rate:.1f}" for rate in won.mean(1)) if len(cells) > 1 else ""
    rates = [f"{100 * won.mean():.1f}", between, by_seed, f"{100 * (won == WORTH['=']).mean():.1f}"]
    apart = statistics.fmean(cell["learned"]["dpo/implicit_accuracy"] for cell in cells)
    return [CELLS[name].title, str(len(cells)), *rates, *_scores(cells), f"{apart:.2f}"]


def _scores(cells: Sequence[Cell]) -> list[str]:
    """Strict GenEval with its standard error, that of one seed's samples; the official one; PickScore."""

    def mean(key: str, of: str = "metrics") -> float:
        return statistics.fmean(cell[of][key] for cell in cells)

    error = mean(STRICT.replace("eval/", "standard_error/"), "standard_errors")
    return [f"{mean(STRICT):.3f} ± {error:.3f}", f"{mean(OFFICIAL):.3f}", f"{mean(GOLD):.2f}"]
