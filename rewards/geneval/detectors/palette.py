"""Detector of the embedded shapes world: palette colour, connected components, template match.

The colours and shape masks of that world live here, so that the renderer
(``flowalign.shapes``) and the detector can never disagree about them.

Shapes: N images, H W pixels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 45),
    "orange": (245, 135, 25),
    "yellow": (245, 230, 60),
    "green": (45, 190, 70),
    "blue": (50, 105, 245),
    "purple": (170, 60, 215),
    "white": (240, 240, 240),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring")
BACKGROUND: tuple[int, int, int] = (22, 22, 28)

_SUPERSAMPLE = 8
_NEIGHBOURS = np.ones((3, 3))  # of a pixel, those at its corners too


def _inside(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return the membership of points in the unit shape; x and y in [-1, 1], y pointing down."""
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius <= 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.9
    if shape == "triangle":
        return (y <= 0.9) & (abs(x) <= (y + 1) / 1.9)
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) <= 0.33) & (np.maximum(abs(x), abs(y)) <= 1)
    if shape == "ring":
        return (radius <= 1) & (radius >= 0.52)
    if shape == "star":
        angle = np.arctan2(x, -y) % (2 * np.pi / 5)
        half = np.pi / 5
        inner = 0.45
        edge = (
            inner
            * np.sin(half)
            / (
                np.sin(half - abs(angle - half)) * (1 - inner * np.cos(half))
                + inner * np.sin(half) * np.cos(half - abs(angle - half))
            )
        )
        return radius <= edge
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


@lru_cache(maxsize=4096)
def shape_mask(shape: str, height: int, width: int) -> NDArray[np.float32]:
    """Return the anti-aliased coverage in [0, 1], (height, width), of a shape that fills the box [-1, 1]²."""
    rows = (np.arange(height * _SUPERSAMPLE) + 0.5) / (height * _SUPERSAMPLE) * 2 - 1
    columns = (np.arange(width * _SUPERSAMPLE) + 0.5) / (width * _SUPERSAMPLE) * 2 - 1
    fine = _inside(shape, columns[None, :], rows[:, None])
    blocks = fine.reshape(height, _SUPERSAMPLE, width, _SUPERSAMPLE)
    mask = blocks.mean(axis=(1, 3), dtype=np.float64).astype(np.float32)
    mask.setflags(write=False)
    return mask


@lru_cache(maxsize=4096)
def _templates(height: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return each shape's silhouette stretched so that its tight box is (height, width), 0 or 1, (6, height · width).

    Beside it are their areas, (6,).
    """
    rows = []
    for shape in SHAPES:
        fine = shape_mask(shape, 48, 48) >= 0.5
        used_rows, used_columns = np.flatnonzero(fine.any(1)), np.flatnonzero(fine.any(0))
        tight = fine[used_rows[0] : used_rows[-1] + 1, used_columns[0] : used_columns[-1] + 1]
        r = ((np.arange(height) + 0.5) / height * tight.shape[0]).astype(int)
        c = ((np.arange(width) + 0.5) / width * tight.shape[1]).astype(int)
        rows.append(tight[np.ix_(r, c)].ravel())
    flat = np.stack(rows).astype(np.float32)
    return flat, flat.sum(axis=1)


class PaletteDetector:
    """Finds coloured shapes on the dark ground; implements ``rewards.geneval.detectors.Detector``.

    A pixel is foreground where its strongest channel stands ``foreground`` (0-255) above the
    ground; its colour is the palette entry with the nearest chromatic direction, so anti-aliased
    edges keep the colour of their object. Components of one colour are compared with every shape
    stretched to the component's box; ``score`` is the intersection over union, mapped from
    [0.5, 0.75] to [0, 1].
    """

    name = "palette"

    def __init__(self, *, foreground: int = 95, min_area: int = 24) -> None:
        self.foreground = foreground
        self.min_area = min_area
        self._names = list(COLORS)
        raw = np.array([COLORS[n] for n in self._names], np.float32) - np.array(BACKGROUND, np.float32)
        self._directions = raw / np.linalg.norm(raw, axis=1, keepdims=True)

    def vocabulary(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return SHAPES, tuple(COLORS)

    def setup(self, device: str) -> None:
        """Do nothing: there is nothing to load."""

    def detect(
        self, images: NDArray[np.uint8], metadata: list[dict[str, Any]]
    ) -> list[dict[str, list[dict[str, Any]]]]:
        """Return the detections of each image, ``{class: [{"box", "score", "color"}]}``.

        Box is x0, y0, x1, y1 in pixels.
        """
        return [self._one(image) for image in images]

    def _one(self, image: NDArray[np.uint8]) -> dict[str, list[dict[str, Any]]]:
        from scipy import ndimage

        above = image.astype(np.float32) - np.array(BACKGROUND, np.float32)
        foreground = np.maximum(np.maximum(above[..., 0], above[..., 1]), above[..., 2]) > self.foreground
        label = np.full(foreground.shape, -1)
        label[foreground] = (above[foreground] @ self._directions.T).argmax(axis=-1)
        found: dict[str, list[dict[str, Any]]] = {}
        for color in np.flatnonzero(np.bincount(label[foreground], minlength=len(self._names))):
            labelled: Any = ndimage.label(label == color, structure=_NEIGHBOURS)
            components = labelled[0]
            for index, where in enumerate(ndimage.find_objects(components), start=1):
                mask = components[where] == index
                if mask.sum() < self.min_area:
                    continue
                shape, score = match(mask)
                rows, columns = where
                box = [float(columns.start), float(rows.start), float(columns.stop), float(rows.stop)]
                found.setdefault(shape, []).append({"box": box, "score": score, "color": self._names[int(color)]})
        for items in found.values():
            items.sort(key=lambda item: (-item["score"], item["box"]))
        return found


def match(mask: NDArray[np.bool_]) -> tuple[str, float]:
    """Return the best shape of a silhouette (h, w) cut to its box, and its score in [0, 1]."""
    templates, areas = _templates(*mask.shape)
    flat = mask.ravel().astype(np.float32)
    inter = (templates @ flat).astype(np.float64)  # numbers of pixels, exact in float32
    iou = inter / (areas + flat.sum() - inter)
    best = int(iou.argmax())
    return SHAPES[best], min(max((float(iou[best]) - 0.5) / 0.25, 0.0), 1.0)
