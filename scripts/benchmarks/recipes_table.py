"""The tables and the curve of scripts/benchmarks/recipes.py, from its JSON files alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from algorithms import CELLS
from alignments import Budget, without
from cells import GOLD, OFFICIAL, STRICT, TASKS, alike, as_markdown, curves, finished
from recipes_cells import REFILL, SCREEN, SFT_KL, TUNE, algorithm_of

# Where the table of a search stands in docs/algorithms.md.
MARKS = {
    "tune": ("<!-- searched: scripts/benchmarks/recipes.py tune --table -->", "<!-- end of searched -->"),
    "screen": ("<!-- screened: scripts/benchmarks/recipes.py screen --table -->", "<!-- end of screened -->"),
    "final": ("<!-- final: scripts/benchmarks/recipes.py final --table -->", "<!-- end of final -->"),
    "soonest": ("<!-- soonest: scripts/benchmarks/recipes.py soonest --table -->", "<!-- end of soonest -->"),
    "sft": ("<!-- fine-tuned: scripts/benchmarks/recipes.py sft --table -->", "<!-- end of fine-tuned -->"),
    "refill": ("<!-- refilled: scripts/benchmarks/recipes.py refill --table -->", "<!-- end of refilled -->"),
}

GAIN = 0.2  # of the strict score, that a quickstart should show
Cell = Mapping[str, Any]


def load(directory: Path) -> list[dict[str, Any]]:
    """The finished cells of a search, the best strict score first.

    They must be of one base and one budget, and those of one configuration differ in what they vary alone.
    """
    cells = finished(directory, {**TUNE, **SCREEN, **SFT_KL, **REFILL}, "points")
    alike(cells, directory, "base", *Budget.__dataclass_fields__)
    for own in grouped([cell for cell in cells if "settings" in cell], lambda cell: cell["config"]):
        varied = {key for cell in own for key in cell["overrides"]}
        alike([{"settings": without(cell["settings"], varied)} for cell in own], directory, "settings")
    return sorted(cells, key=strict, reverse=True)


def best(cells: Sequence[Cell]) -> list[str]:
    """The names of cells by their strict score, the mean over their seeds, the best first."""
    groups = grouped(cells, lambda cell: cell["cell"])
    return [own[0]["cell"] for own in sorted(groups, key=lambda own: -statistics.fmean(map(strict, own)))]


def strict(cell: Cell) -> float:
    """The strict score after all of its minutes, not the best on the way: the best of several is partly luck."""
    return cell["points"][-1][STRICT]


def grouped(cells: Sequence[Cell], by: Any) -> list[list[Cell]]:
    """Cells by a key of theirs, the group of the best first."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(by(cell), []).append(cell)
    return list(groups.values())


def tuned(cells: Sequence[Cell]) -> str:
    """The best cell of each algorithm, and what each of its cells has come to; in brackets the most on the way."""
    rows = []
    for own in grouped(cells, lambda cell: algorithm_of(cell["cell"])):
        name, end = algorithm_of(own[0]["cell"]), own[0]["points"][-1]
        at = ", ".join([f"{rate(own[0]):.3g}", *filter(None, [varied(own[0])])])
        row = [CELLS[name].title, at, f"{end[STRICT]:.3f}", f"{end[OFFICIAL]:.3f}"]
        row += [f"{end[GOLD]:.2f}", *(f"{end[f'eval/geneval_strict/{task}']:.2f}" for task in TASKS)]
        tried = [f"{told(cell)} {strict(cell):.3f} ({most(cell):.3f})" for cell in sorted(own, key=rate)]
        rows.append([*row, f"{end['images']:,}", ", ".join(tried)])
    return as_markdown(
        ["algorithm", "learning rate", "strict", "official", "PickScore", *TASKS, "images", "tried"], rows
    )


def table_of(search: str, cells: Sequence[Cell], titles: Mapping[str, str]) -> str:
    if search == "tune":
        return tuned(cells)
    if search == "refill":
        return refilled(cells, titles)
    return soonest(cells) if search == "soonest" else screened(cells, titles)


def soonest(cells: Sequence[Cell]) -> str:
    """Strict scores on the way, means over seeds, and the minutes of training until they lie 0.20 above the first."""
    groups = grouped(cells, lambda cell: cell["cell"])
    rows = []
    for own in groups:
        points = [statistics.fmean(values) for values in zip(*(scores(cell) for cell in own), strict=True)]
        at = [point["iteration"] * own[0]["iteration_s"] / 60 for point in own[0]["points"]]
        until = reached(at, points, points[0] + GAIN)
        row = [CELLS[algorithm_of(own[0]["cell"])].title, f"{rate(own[0]):.3g}", str(len(own))]
        said = "–" if until is None else f"{until:.1f}"
        rows.append((until is None, until, [*row, *(f"{score:.3f}" for score in points), said]))
    parts = len(groups[0][0]["points"]) - 1
    on_the_way = [f"after {part}/{parts}" for part in range(1, parts)]
    head = ["algorithm", "learning rate", "seeds", "before", *on_the_way, "end", f"minutes to +{GAIN:.2f}"]
    return as_markdown(head, [row for *_, row in sorted(rows, key=lambda row: row[:2])])


def refilled(cells: Sequence[Cell], titles: Mapping[str, str]) -> str:
    """What refills cost and bring, means over seeds in the order of the draws."""
    by_name = {own[0]["cell"]: own for own in grouped(cells, lambda cell: cell["cell"])}
    rows = []
    for name, title in titles.items():
        if (own := by_name.get(name)) is None:
            continue
        ends = [cell["points"][-1] for cell in own]
        spread = f" ± {statistics.stdev(map(strict, own)):.3f}" if len(own) > 1 else ""
        means = {key: statistics.fmean(cell[key] for cell in own) for key in ("iteration_s", "silent", "taught")}
        rows.append(
            [
                title,
                str(len(own)),
                f"{means['silent']:.2f}",
                f"{means['taught']:.1f}",
                f"{means['iteration_s']:.2f}",
                f"{statistics.fmean(end['iteration'] for end in ends):,.0f}",
                f"{statistics.fmean(end['images'] for end in ends):,.0f}",
                f"{statistics.fmean(map(strict, own)):.3f}{spread}",
                f"{statistics.fmean(end[GOLD] for end in ends):.2f}",
            ]
        )
    head = ["cell", "seeds", "silent", "groups that teach", "seconds", "iterations", "images", "strict", "PickScore"]
    return as_markdown(head, rows)


def scores(cell: Cell) -> list[float]:
    return [point[STRICT] for point in cell["points"]]


def reached(at: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """Return when values first reach a level, on straight lines between them; None: never."""
    for (t0, v0), (t1, v1) in pairwise(zip(at, values, strict=True)):
        if v1 >= level:
            return t0 + (t1 - t0) * (level - v0) / (v1 - v0)
    return None


def rate(cell: Cell) -> float:
    return cell["learning_rate"]


def told(cell: Cell) -> str:
    """A cell's learning rate, or the further key that it varies."""
    return f"{varied(cell) or format(rate(cell), '.3g')}:"


def varied(cell: Cell) -> str:
    """The key that a cell varies beside the learning rate, with its value; nothing where it varies that rate."""
    tag = cell["cell"].partition("-")[2]
    return "" if tag.startswith("rate-") else tag.replace("-", " ")


def most(cell: Cell) -> float:
    return max(point[STRICT] for point in cell["points"])


def screened(cells: Sequence[Cell], titles: Mapping[str, str]) -> str:
    """Each cell's scores, means over seeds, and where there is a start how far they lie above its own."""
    by_name = {own[0]["cell"]: own for own in grouped(cells, lambda cell: cell["cell"])}

    def mean(own: Sequence[Cell], key: str) -> float:
        return statistics.fmean(cell["points"][-1][key] for cell in own)

    start = mean(by_name["start"], STRICT) if "start" in by_name else None
    rows = []
    for name, own in sorted(by_name.items(), key=lambda item: -mean(item[1], STRICT)):
        spread = f" ± {statistics.stdev(map(strict, own)):.3f}" if len(own) > 1 else ""
        gain = [] if start is None else [f"{mean(own, STRICT) - start:+.3f}"]
        scores = [f"{mean(own, STRICT):.3f}{spread}", *gain, f"{mean(own, OFFICIAL):.3f}", f"{mean(own, GOLD):.2f}"]
        tasks = [f"{mean(own, f'eval/geneval_strict/{task}'):.2f}" for task in TASKS]
        images = f"{statistics.fmean(cell['points'][-1]['images'] for cell in own):,.0f}"
        rows.append([titles[name], str(len(own)), *scores, *tasks, images])
    above = [] if start is None else [f"above {titles['start'].partition(':')[0]}"]
    head = ["cell", "seeds", "strict", *above, "official", "PickScore", *TASKS, "images"]
    return as_markdown(head, rows)


def curve(directory: Path, path: Path) -> None:
    """Strict GenEval against images, a line a recipe: its mean over seeds, and from the least seed to the most."""
    lines = {}
    for own in grouped(load(directory), lambda cell: cell["cell"]):
        images = [point["images"] for point in own[0]["points"]]
        lines[SCREEN[own[0]["cell"]].title] = images, [[point[STRICT] for point in cell["points"]] for cell in own]
    if not lines:
        raise SystemExit(f"{directory} holds no finished cell: `final` first")
    curves(lines, "images", "strict GenEval of held-out samples, mean and range over seeds", path, spread=True)
