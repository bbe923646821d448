"""Seeded procedural images of the embedded world: up to four coloured shapes on a dark ground."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rewards.detectors.palette import BACKGROUND, COLORS, shape_mask

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
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = BACKGROUND
    for thing in things:
        radius = int(rng.integers(_RADII[0], _RADII[1] + 1))
        dy, dx = rng.integers(-_JITTER, _JITTER + 1, size=2)
        top = thing.cell[0] * _CELL + _CELL // 2 + int(dy) - radius
        left = thing.cell[1] * _CELL + _CELL // 2 + int(dx) - radius
        mask = shape_mask(thing.shape, 2 * radius, 2 * radius)[..., None]
        area = image[top : top + 2 * radius, left : left + 2 * radius]
        area += mask * (np.array(COLORS[thing.color], np.float32) - area)
    return np.rint(image).astype(np.uint8)
