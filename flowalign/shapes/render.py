"""Seeded procedural images of the embedded world: up to four coloured shapes on a dark ground."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rewards.geneval.detectors.palette import BACKGROUND, COLORS, shape_mask

SIZE = 64
_CELL = 32
_JITTER = 3
_RADII = (8, 11)


@dataclass(frozen=True)
class Thing:
    """One object: its shape, colour and the cell (row, column) of the 2 × 2 layout it sits in."""

    shape: str
    color: str
    cell: tuple[int, int]


def render(things: Sequence[Thing], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw an image, uint8 (64, 64, 3); size and offset inside its cell are drawn from ``rng``."""
    return render_with_masks(things, rng)[0]


def render_with_masks(
    things: Sequence[Thing], rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return the image of ``render``, and the coverage of each object, float32 (objects, 64, 64) in [0, 1]."""
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = BACKGROUND
    masks = np.zeros((len(things), SIZE, SIZE), np.float32)
    for thing, coverage in zip(things, masks, strict=True):
        radius = int(rng.integers(_RADII[0], _RADII[1] + 1))
        dy, dx = rng.integers(-_JITTER, _JITTER + 1, size=2)
        top = thing.cell[0] * _CELL + _CELL // 2 + int(dy) - radius
        left = thing.cell[1] * _CELL + _CELL // 2 + int(dx) - radius
        where = np.s_[top : top + 2 * radius, left : left + 2 * radius]
        coverage[where] = shape_mask(thing.shape, 2 * radius, 2 * radius)
        area = image[where]
        area += coverage[where][..., None] * (np.array(COLORS[thing.color], np.float32) - area)
    return np.rint(image).astype(np.uint8), masks
