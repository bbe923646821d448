"""The colour classifier of the GenEval benchmark: open_clip zero-shot over ten colours (arXiv:2310.11513).

An object is shown on grey (#999), cut to its box, and compared with the mean embedding of three phrases a colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from rewards.interface import SpecError
from rewards.models.openclip import OpenClip

BENCHMARK_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {thing}", "a photo of a {color}-colored {thing}", "a photo of a {color} object")
GROUND = "#999"


class ZeroShotColors:
    """Names the colour of masked objects.

    Options: those of the ``clip`` scorer (``path``, or ``model`` and ``checkpoint``; ``precision``), and ``names``, the
    colours. The benchmark's model is ``model: ViT-L-14-quickgelu, checkpoint: openai``.
    """

    def __init__(self, *, names: Sequence[str] = BENCHMARK_COLORS, **clip: Any) -> None:
        if len(names) < 2:
            raise SpecError("colour classifier: give at least two colour names")
        self.names = tuple(names)
        self.clip = OpenClip("colour classifier", **clip)
        self._classes: dict[str, Any] = {}

    def setup(self, device: str) -> None:
        self.clip.setup(device)
        self._classes.clear()

    def classify(
        self, image: np.ndarray, boxes: Sequence[Sequence[float]], masks: Sequence[np.ndarray], thing: str
    ) -> list[str]:
        """Return the colour of each object: uint8 image (H, W, 3), boxes x0 y0 x1 y1 in pixels, bool masks (H, W)."""
        import torch

        with torch.inference_mode():
            crops = [self.clip.pixels(crop(image, *pair)[None]) for pair in zip(boxes, masks, strict=True)]
            return [self.names[i] for i in (self.clip.embed(torch.cat(crops)) @ self._of(thing).T).argmax(1).tolist()]

    def _of(self, thing: str) -> Any:
        """Return the unit embeddings (colours, D) of the phrases about one class of things."""
        import torch

        if thing not in self._classes:
            rows = []
            for color in self.names:
                phrases = [template.format(color=color, thing=thing) for template in TEMPLATES]
                rows.append(torch.nn.functional.normalize(self.clip.texts(phrases).mean(0), dim=-1))
            self._classes[thing] = torch.stack(rows)
        return self._classes[thing]


def crop(image: np.ndarray, box: Sequence[float], mask: np.ndarray) -> np.ndarray:
    """Return the object on grey, cut to its box, whose edges are rounded: uint8 (h, w, 3)."""
    picture = Image.fromarray(image)
    ground = Image.new("RGB", picture.size, color=GROUND)
    shown = Image.composite(picture, ground, Image.fromarray(mask.astype(np.uint8) * 255))
    x0, y0, x1, y1 = box
    return np.asarray(shown.crop((x0, y0, x1, y1)))
