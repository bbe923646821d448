"""The page of a comparison of models: what each won and lost against the first, and the pictures that changed most."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flowalign.measure.changed import Changed
from flowalign.measure.clustered import BETTER, FEWEST, WORSE
from flowalign.measure.compared import LEVEL, Comparison, Row
from flowalign.measure.evaluated import made_with
from flowalign.measure.kept import Evaluation
from flowalign.record.textfiles import inside
from flowalign.report.page import signed, template
from flowalign.report.samples import PIXEL_ART, Shown, picture_uri, shown
from rewards.interface import ScorerError

UNSEEN = "data:,"  # of a picture that cannot be shown
_OWN = ("weights", "images_per_s", "judges")  # of a model's facts: not the same for all, or shown by themselves


@dataclass(frozen=True)
class Line:
    """A row of a table, with where its interval lies between the ends of the scale, in percent of it."""

    row: Row
    low: float | None
    high: float | None
    point: float | None

    @property
    def tone(self) -> str:
        return tone(self.row.difference.verdict)


@dataclass(frozen=True)
class Strip:
    """A prompt and what each model made of it, in the models' order."""

    changed: Changed
    pictures: Sequence[Shown]

    @property
    def change(self) -> str:
        """Tell whether the other models gained the picture or lost it, in the words of the style; nothing where they
        do not agree."""
        before, *after = (picture.score for picture in self.pictures)
        steps = [score - before for score in after if score is not None and before is not None]
        if not steps or min(steps) == max(steps) == 0 or min(steps) < 0 < max(steps):
            return ""
        return "gained" if max(steps) > 0 else "lost"


def tone(verdict: str) -> str:
    """Return the word of the style for a verdict."""
    return {BETTER: "up", WORSE: "down"}.get(verdict, "")


def page_of(comparison: Comparison, changed: Sequence[Changed], same: Sequence[int], notes: Sequence[str] = ()) -> str:
    """Return the page as HTML, one file that needs no network. Every text in it may be from outside."""
    first = comparison.models[0]
    strips, side = _strips(comparison.models, changed)
    scale = max((_reach(row) for found in comparison.found for row in found.rows), default=0.0) or 1.0
    tables = [(found, [_line(row, scale) for row in found.rows]) for found in comparison.found]
    return template("comparison.html").render(
        name=" · ".join(model.label for model in comparison.models),
        models=comparison.models,
        first=first,
        comparison=comparison,
        tables=tables,
        tone=tone,
        interval=interval,
        how=how_made(comparison),
        explained=explained(comparison),
        same=same_pictures_said(comparison, same),
        settings=_settings(first),
        strips=strips,
        pixelated=0 < side <= PIXEL_ART,
        notes=notes,
    )


def how_made(comparison: Comparison) -> str:
    """Say of how many samples of what all models are, made how."""
    made = comparison.models[0].made
    source = f" ({made['prompts']})" if "prompts" in made else ""
    how = f"; {made_with({**made, 'weights': ''}).rpartition(', weights')[0]}" if "num_steps" in made else ""
    return f"{comparison.num_samples} samples of {comparison.num_prompts} prompts{source}, the same noises for all{how}"


def same_pictures_said(comparison: Comparison, same: Sequence[int]) -> list[str]:
    """Say of each other model how many pictures are those of the first; nothing where there is none."""
    first, *others = comparison.models
    return [
        f"{count} of {comparison.num_samples} pictures of {model.label} are those of {first.label}, byte for byte"
        for model, count in zip(others, same, strict=True)
        if count
    ]


def _settings(first: Evaluation) -> dict[str, str]:
    """Return what all models were sampled and judged by, as texts."""
    found = {key.replace("_", " "): str(value) for key, value in first.made.items() if key not in _OWN}
    judges = first.made.get("judges", ())
    return found | {f"scorer {judge['name']}": json.dumps(judge) for judge in judges}


def interval(row: Row, digits: int) -> str:
    """Write the interval of a difference; where none is known say why."""
    own = row.difference
    if not math.isnan(own.low):
        return f"{signed(own.low, digits)} to {signed(own.high, digits)}"
    return f"none: {own.differ} of {own.prompts} differ" if own.differ < FEWEST else "none"


def explained(comparison: Comparison) -> str:
    """Say in a few sentences what the intervals are, and what they are corrected for."""
    count = len(comparison.models) - 1
    level = f"{100 * comparison.level:.4g} %"
    said = (
        f"A difference is the mean over the same {comparison.num_samples} samples, behind it its {level} interval. It "
        f"counts {comparison.num_prompts} prompts, since samples of one prompt are not independent."
    )
    if count > 1:
        said += f" The intervals of all {count} models hold at once with {100 * LEVEL:g} % (Bonferroni)."
    said += " They are not corrected for the number of tasks and scores: of twenty equal ones, one is said to differ."
    return f"{said} Without {FEWEST} prompts that differ there is none."


def _reach(row: Row) -> float:
    own = row.difference
    return max((abs(value) for value in (own.value, own.low, own.high) if math.isfinite(value)), default=0.0)


def _line(row: Row, scale: float) -> Line:
    own = row.difference
    places = [50 + 50 * value / scale if math.isfinite(value) else None for value in (own.low, own.high, own.value)]
    return Line(row, *places)


def _strips(models: Sequence[Evaluation], changed: Sequence[Changed]) -> tuple[list[Strip], int]:
    """Return the strips, and the longer side of the largest picture."""
    strips, largest = [], 0
    for one in changed:
        pictures = []
        for model, score in zip(models, one.scores, strict=True):
            uri, side = _picture(model, one.file)
            largest = max(largest, side)
            pictures.append(shown(uri, score))
        strips.append(Strip(one, pictures))
    return strips, largest


def _picture(model: Evaluation, file: str) -> tuple[str, int]:
    """Return a picture as `picture_uri`; of an evaluation that is somebody else's only what lies inside."""
    path: Any = model.folder / file
    try:
        return picture_uri(path.read_bytes()) if inside(path, model.folder) else (UNSEEN, 0)
    except (ScorerError, OSError):
        return UNSEEN, 0
