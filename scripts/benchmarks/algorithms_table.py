"""The table and the curves of scripts/benchmarks/algorithms.py, from its JSON files alone."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import GOLD, OFFICIAL, STRICT, TASKS, alike, as_markdown, curves, finished, read

BEGIN, END = "<!-- measured: scripts/benchmarks/algorithms.py table -->", "<!-- end of measured -->"
HEAD = ["algorithm", "seeds", "strict", "official", "PickScore", *TASKS, "images", "transitions", "s/iteration"]
HEAD += ["minutes to +0.10", "to +0.20"]

Cell = Mapping[str, Any]


def load(directory: Path, titles: Mapping[str, str]) -> list[dict[str, Any]]:
    """The finished cells, of one base and one budget.

    Each point gets its seconds from the speed that was measured for the cell's iterations.
    """
    speeds = read(directory / "seconds.json", "cells")["cells"]
    there = finished(directory, titles, "points")
    alike(there, directory, "base", "minutes", "evaluations", "num_samples")
    for name in titles:
        alike([cell for cell in there if cell["cell"] == name], directory, "settings")
    cells = []
    for cell in there:
        if cell["cell"] not in speeds:
            raise SystemExit(f"{directory / 'seconds.json'} has no seconds of {cell['cell']}: `time` first")
        speed = speeds[cell["cell"]]["iteration_s"]
        timed = [{**point, "seconds": point["iteration"] * speed} for point in cell["points"]]
        cells.append({**cell, "title": titles[cell["cell"]], "iteration_s": speed, "points": timed})
    return cells


def at(seconds: float, points: Sequence[Mapping[str, Any]], key: str) -> float:
    """``key`` after so many seconds, between evaluations by a straight line, after the last one as it was there."""
    for before, after in itertools.pairwise(points):
        if after["seconds"] >= seconds:
            share = (seconds - before["seconds"]) / (after["seconds"] - before["seconds"])
            return before[key] + share * (after[key] - before[key])
    return points[-1][key]


def seconds_to(gain: float, points: Sequence[Mapping[str, Any]]) -> float | None:
    """When the strict score first stood ``gain`` above its start, between evaluations by a straight line."""
    wanted = points[0][STRICT] + gain
    for before, after in itertools.pairwise(points):
        if after[STRICT] >= wanted:
            share = (wanted - before[STRICT]) / (after[STRICT] - before[STRICT])
            return before["seconds"] + share * (after["seconds"] - before["seconds"])
    return None


def grouped(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells of each algorithm, the best first."""
    by_name: dict[str, list[Cell]] = {}
    for cell in cells:
        by_name.setdefault(cell["cell"], []).append(cell)
    limit = 60 * cells[0]["minutes"]
    return sorted(by_name.values(), key=lambda own: -statistics.fmean(at(limit, c["points"], STRICT) for c in own))


def row(own: Sequence[Cell]) -> list[str]:
    limit = 60 * own[0]["minutes"]

    def mean(key: str, digits: int = 3) -> str:
        values = [at(limit, cell["points"], key) for cell in own]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and key == STRICT else ""
        return f"{statistics.fmean(values):.{digits}f}{spread}"

    def to(gain: float) -> str:
        reached = [seconds_to(gain, cell["points"]) for cell in own]
        known = [seconds for seconds in reached if seconds is not None]
        return f"{statistics.fmean(known) / 60:.1f}" if len(known) == len(reached) else "-"

    tasks = [mean(f"eval/geneval_strict/{task}", 2) for task in TASKS]
    used = [f"{float(mean(key, 0)):,.0f}" for key in ("images", "transitions")]
    scores = [mean(STRICT), mean(OFFICIAL), mean(GOLD, 2), *tasks]
    return [own[0]["title"], str(len(own)), *scores, *used, f"{own[0]['iteration_s']:.1f}", to(0.1), to(0.2)]


def markdown(cells: Sequence[Cell]) -> str:
    start = cells[0]["points"][0]
    base = ["before", "", f"{start[STRICT]:.3f}", f"{start[OFFICIAL]:.3f}", f"{start[GOLD]:.2f}"]
    base += [f"{start[f'eval/geneval_strict/{task}']:.2f}" for task in TASKS] + [""] * 5
    return as_markdown(HEAD, [base, *(row(own) for own in grouped(cells))])


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Strict GenEval against minutes, a line an algorithm, its mean over seeds."""
    lines = {}
    for own in grouped(cells):
        times = [point["seconds"] / 60 for point in own[0]["points"]]
        scores = [[point[STRICT] for point in cell["points"]] for cell in own]
        lines[own[0]["title"]] = times, scores
    curves(lines, "minutes of training, evaluations left out", "strict GenEval, 600 held-out samples", path)
