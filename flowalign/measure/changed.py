"""Pictures of several models from the same noises: which are the same, and which changed most."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flowalign.measure.kept import Evaluation
from flowalign.record.textfiles import inside
from rewards.interface import ScorerError
from rewards.pictures import read


@dataclass(frozen=True)
class Changed:
    """A sample that changed: its score under each model (None: it has none), and the mean difference of its pixels from
    the first model's, 0 to 1, where it is largest."""

    file: str
    prompt: str
    task: str
    scores: Sequence[float | None]
    pixels: float


def same_pictures(first: Evaluation, other: Evaluation) -> int:
    """Count the samples whose picture files are equal, byte for byte."""
    return sum(_equal(first, other, file) for file in first.rows)


def without_picture(model: Evaluation) -> list[str]:
    """Return the samples whose picture file is not in the folder of the evaluation."""
    return [file for file in model.rows if not inside(model.folder / file, model.folder)]


def changed_most(models: Sequence[Evaluation], metric: str, count: int) -> list[Changed]:
    """Return up to ``count`` samples whose score by ``metric`` differs most from the first model's, under any other.

    Of those that differ by the same, the ones whose pixels differ most come first. What did not change is not there.
    """
    first, *others = models
    steps = {file: _step(models, file, metric) for file in first.rows}
    lacking = {file for model in models for file in without_picture(model)}
    files = [
        file
        for file in first.rows
        if steps[file] or (file not in lacking and not all(_equal(first, other, file) for other in others))
    ]
    least = min(heapq.nlargest(count, (steps[file] for file in files)), default=0.0)
    pixels = {file: _pixels(models, file) for file in files if steps[file] >= least}
    chosen = sorted(pixels, key=lambda file: (-steps[file], -pixels[file], file))[:count]
    return [_changed(models, file, metric, pixels[file]) for file in chosen]


def _changed(models: Sequence[Evaluation], file: str, metric: str, pixels: float) -> Changed:
    row = models[0].rows[file]
    return Changed(file, row["prompt"], row["tag"], [m.rows[file]["scores"].get(metric) for m in models], pixels)


def _step(models: Sequence[Evaluation], file: str, metric: str) -> float:
    before, *after = (model.rows[file]["scores"].get(metric) for model in models)
    return max((abs(score - before) for score in after if None not in (score, before)), default=0.0)


def _pixels(models: Sequence[Evaluation], file: str) -> float:
    """Return the largest mean difference of a picture's pixels; 0 where pictures have other sizes or cannot be read."""
    try:
        before, *after = (read(_content(model, file)).astype(np.float32) / 255 for model in models)
    except ScorerError:
        return 0.0
    return max((float(np.abs(image - before).mean()) for image in after if image.shape == before.shape), default=0.0)


def _equal(first: Evaluation, other: Evaluation, file: str) -> bool:
    paths = [model.folder / file for model in (first, other)]
    if not all(inside(path, model.folder) for path, model in zip(paths, (first, other), strict=True)):
        return False
    return paths[0].stat().st_size == paths[1].stat().st_size and paths[0].read_bytes() == paths[1].read_bytes()


def _content(model: Evaluation, file: str) -> bytes:
    return (model.folder / file).read_bytes() if inside(model.folder / file, model.folder) else b""
