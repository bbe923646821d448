"""The README's picture: docs/figures/before_after.png and before_after_dark.png, from a run and its evaluations.

    flowalign compare shapes runs/NAME --out build/comparison
    python -m scripts.figures.before_after --run runs/NAME --before build/comparison/shapes \\
        --after build/comparison/NAME [--seed 0] [--out docs/figures]

It shows prompts with what the model made of them before and after, from the same noise, and what the run's
metrics.jsonl says: the evaluated score, that of the images trained on, and the score by task. Which samples are shown
is drawn by the seed alone, as many of each task.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from flowalign.measure.compared import check_same_samples
from flowalign.measure.kept import Evaluation, read_evaluation
from flowalign.record.metrics import read_metrics

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

WIDTH, DENSITY = 830, 2  # of a page of GitHub, and the dots of a pixel there
SIDE, GAP, TEXT_H, ROW_GAP, TOP, EDGE = 82, 8, 30, 13, 24, 4
COLUMNS, BETWEEN = 3, 18
PAIR = 2 * SIDE + GAP
LEFT = COLUMNS * PAIR + (COLUMNS - 1) * BETWEEN


NAMES = {"color_attr": "two colours", "colors": "colour", "single_object": "one object", "two_object": "two objects"}


@dataclass(frozen=True)
class Theme:
    """Colours of a page."""

    ground: str
    text: str
    faint: str
    line: str
    grid: str


THEMES = {
    "before_after.png": Theme("#ffffff", "#1f2328", "#59636e", "#0969da", "#d1d9e0"),
    "before_after_dark.png": Theme("#0d1117", "#f0f6fc", "#9198a1", "#58a6ff", "#3d444d"),
}
RIGHT, WRONG = "#1a7f37", "#cf222e"
_CROSS = [((-0.34, -0.34), (0.34, 0.34)), ((-0.34, 0.34), (0.34, -0.34))]


def drawn(evaluation: Evaluation, metric: str, *, a_task: int, seed: int) -> list[str]:
    """Return the file names of ``a_task`` samples of each task, drawn by ``seed`` among those with a score."""
    tasks: dict[str, list[str]] = {}
    for file, row in sorted(evaluation.rows.items()):
        if row["scores"].get(metric) is not None:
            tasks.setdefault(row["tag"], []).append(file)
    chance = random.Random(seed)
    chosen = [chance.sample(files, min(a_task, len(files))) for _, files in sorted(tasks.items())]
    return [file for files in chosen for file in files]


class Sheet:
    """A figure in whose pixels, counted from the upper left, things are placed."""

    def __init__(self, height: float, theme: Theme) -> None:
        self.height, self.theme = height, theme
        self.figure: Figure = pyplot.figure(figsize=(WIDTH / 100, height / 100), dpi=100 * DENSITY)
        self.figure.set_facecolor(theme.ground)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Return axes at this place."""
        place = (x / WIDTH, 1 - (y + height) / self.height, width / WIDTH, height / self.height)
        axes = self.figure.add_axes(place, facecolor=self.theme.ground)
        axes.tick_params(colors=self.theme.faint, labelsize=7.5, length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        return axes

    def text(self, x: float, y: float, text: str, *, size: float = 8, faint: bool = False, **more: Any) -> None:
        """Write text whose first line begins at this height."""
        color = self.theme.faint if faint else self.theme.text
        place = {"va": "top", "linespacing": 1.15} | more
        self.figure.text(x / WIDTH, 1 - y / self.height, text, fontsize=size, color=color, **place)

    def picture(self, x: float, y: float, file: Path, right: bool) -> None:
        """Show a picture with the mark of a right or a wrong one in its corner."""
        axes = self.axes(x, y, SIDE, SIDE)
        with Image.open(file) as image:
            side = SIDE * DENSITY
            axes.imshow(np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)))
        axes.set(xticks=[], yticks=[])
        for edge in axes.spines.values():
            edge.set(visible=True, color=self.theme.grid, linewidth=0.6)
        self._mark(x + SIDE - 3, y + SIDE - 3, right)

    def _mark(self, x: float, y: float, right: bool) -> None:
        """Draw a mark around this place; it hides little of a picture at whose corner it is."""
        radius = 8
        axes = self.axes(x - radius, y - radius, 2 * radius, 2 * radius)
        axes.set(xlim=(-1, 1), ylim=(1, -1))
        axes.axis("off")
        axes.add_patch(pyplot.Circle((0, 0), 1, color=self.theme.ground, linewidth=0))
        axes.add_patch(pyplot.Circle((0, 0), 0.86, color=RIGHT if right else WRONG, linewidth=0))
        strokes = [((-0.42, 0), (-0.12, 0.34), (0.44, -0.34))] if right else _CROSS
        for stroke in strokes:
            axes.plot(*zip(*stroke, strict=True), color="white", linewidth=1.5, solid_capstyle="round")

    def save(self, path: Path) -> None:
        """Write it as a PNG of 256 colours."""
        made = io.BytesIO()
        self.figure.savefig(made, format="png", facecolor=self.theme.ground)
        pyplot.close(self.figure)
        with Image.open(made) as image:
            image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def draw(
    before: Evaluation,
    after: Evaluation,
    rows: Sequence[Mapping[str, Any]],
    metric: str,
    files: Sequence[str],
    path: Path,
) -> None:
    """Write the picture of these samples and of a run's ``rows`` of metrics, in the colours of ``path``'s name."""
    lines = -(-len(files) // COLUMNS)
    height = TOP + lines * (TEXT_H + SIDE + ROW_GAP)
    sheet = Sheet(height, THEMES[path.name])
    for column in range(min(COLUMNS, len(files))):
        x = EDGE + column * (PAIR + BETWEEN)
        for place, label in ((x, "before"), (x + SIDE + GAP, "after")):
            sheet.text(place, 4, label, size=8, weight="bold")
    for number, file in enumerate(files):
        line, column = divmod(number, COLUMNS)
        x, y = EDGE + column * (PAIR + BETWEEN), TOP + line * (TEXT_H + SIDE + ROW_GAP)
        prompt = "\n".join(textwrap.wrap(before.rows[file]["prompt"], 31)[:2])
        sheet.text(x, y + TEXT_H - 4, prompt, size=7.5, faint=True, va="bottom")
        for model, place in ((before, x), (after, x + SIDE + GAP)):
            sheet.picture(place, y + TEXT_H, model.folder / file, model.rows[file]["scores"][metric] >= 1)
    left = LEFT + 62
    half = (height - TOP) / 2
    sheet.text(left - 26, 4, "share of right pictures", size=8, weight="bold")
    curve(sheet.axes(left, TOP + 8, WIDTH - left - 10, half - 40), rows, metric, sheet.theme)
    sheet.text(left - 26, TOP + half + 4, "by task: ○ before, ● after", size=8, weight="bold")
    by_task(sheet.axes(left + 44, TOP + half + 26, WIDTH - left - 54, half - 52), rows, metric, sheet.theme)
    sheet.save(path)


def curve(axes: Axes, rows: Sequence[Mapping[str, Any]], metric: str, theme: Theme) -> None:
    """Draw the evaluations of a run, with intervals of 95 %, above the score of the images that it learned from."""
    learned = [(row["iteration"], row[key]) for row in rows if (key := f"reward/{metric}/mean") in row]
    if learned:
        axes.plot(*zip(*learned, strict=True), color=theme.faint, linewidth=0.8, alpha=0.7)
    overall = f"eval/{metric}/overall"
    evaluated = [row for row in rows if overall in row]
    at, values = [row["iteration"] for row in evaluated], [row[overall] for row in evaluated]
    errors = [1.96 * row.get(f"standard_error/{metric}/overall", 0.0) for row in evaluated]
    axes.errorbar(at, values, errors, color=theme.line, linewidth=2, marker="o", markersize=5, capsize=3)
    for x, value, error in zip(at, values, errors, strict=True):
        inner = "left" if x == at[0] else "right" if x == at[-1] else "center"
        said = axes.annotate(f"{value:.2f}", (x, value + error), (0, 4), textcoords="offset points", ha=inner)
        said.set(color=theme.line, fontsize=9, weight="bold")
        said.set_path_effects([withStroke(linewidth=3, foreground=theme.ground)])
    axes.set(ylim=(0, 1), yticks=(0, 0.25, 0.5, 0.75, 1), xticks=at)
    axes.set_yticklabels(["0", "", "0.5", "", "1"])
    axes.set_xlabel("iteration", fontsize=7.5, color=theme.faint, labelpad=2)
    axes.grid(axis="y", color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    of = f"{count:.0f} " if (count := evaluated[-1].get("eval/num_samples")) else ""
    said = f"{of}held-out samples, 95 % intervals"
    for height, text, color in ((0.13, said, theme.line), (0.04, "the images that it learns from", theme.faint)):
        axes.text(0.98, height, text, transform=axes.transAxes, ha="right", fontsize=7.5, color=color)


def by_task(axes: Axes, rows: Sequence[Mapping[str, Any]], metric: str, theme: Theme) -> None:
    """Draw a line a task, from the first evaluation to the last."""
    evaluated = [row for row in rows if f"eval/{metric}/overall" in row]
    first, last = evaluated[0], evaluated[-1]
    keys = [key for key in first if key.startswith(f"eval/{metric}/") and not key.endswith("/overall")]
    for place, key in enumerate(sorted(keys, reverse=True)):
        a, b = first[key], last[key]
        axes.annotate("", (b, place), (a, place), arrowprops={"arrowstyle": "-", "color": theme.line, "lw": 2.5})
        axes.plot([a], [place], "o", color=theme.ground, markeredgecolor=theme.line, markersize=6, markeredgewidth=1.5)
        axes.plot([b], [place], "o", color=theme.line, markersize=6.5)
    names = [NAMES.get(task := key.rpartition("/")[2], task) for key in sorted(keys, reverse=True)]
    axes.set(xlim=(0, 1.03), ylim=(-0.6, len(keys) - 0.4), xticks=(0, 0.25, 0.5, 0.75, 1))
    axes.set_xticklabels(["0", "", "0.5", "", "1"])
    axes.set_yticks(range(len(keys)), names)
    axes.grid(axis="x", color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the run, of which metrics.jsonl is read")
    parser.add_argument("--before", type=Path, required=True, help="the evaluation of the base")
    parser.add_argument("--after", type=Path, required=True, help="the evaluation of the run, on the same noises")
    parser.add_argument("--metric", default="geneval_strict")
    parser.add_argument("--a-task", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    options = parser.parse_args()
    before, after = read_evaluation(options.before, "before"), read_evaluation(options.after, "after")
    check_same_samples(before, after)
    files = drawn(before, options.metric, a_task=options.a_task, seed=options.seed)
    rows = read_metrics(options.run / "metrics.jsonl")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in THEMES:
        draw(before, after, rows, options.metric, files, options.out / name)
    right = [sum(model.rows[file]["scores"][options.metric] >= 1 for file in files) for model in (before, after)]
    print(json.dumps({"samples": len(files), "right_before": right[0], "right_after": right[1]}))


if __name__ == "__main__":
    main()
