"""JPEG size as a reward (Black et al. 2023, arXiv:2305.13301): needs no model, so runs anywhere."""

from __future__ import annotations

import io
from typing import Literal, get_args

import numpy as np
from PIL import Image

from rewards.interface import Answers, Asked, SpecError

Goal = Literal["compressible", "incompressible"]


class JpegScorer(Answers):
    """``jpeg``: minus (``compressible``) or plus (``incompressible``) the encoded size in kilobytes."""

    name = "jpeg"

    def __init__(
        self, *, goal: Goal = "compressible", quality: int = 95, device: str = "cpu", batch_size: int = 1
    ) -> None:
        if goal not in get_args(Goal):
            raise SpecError(f"jpeg: goal {goal!r} is unknown; write {' or '.join(get_args(Goal))}")
        if not 1 <= quality <= 95:
            raise SpecError(f"jpeg: quality is {quality}; write 1 to 95")
        self.device = device
        self.batch_size = batch_size
        self.sign = -1.0 if goal == "compressible" else 1.0
        self.range = (-np.inf, 0.0) if goal == "compressible" else (0.0, np.inf)
        self.quality = quality

    def answer(self, asked: Asked) -> dict[str, np.ndarray]:
        """Return ``{"jpeg": (N,)}`` in kilobytes (1000 bytes)."""
        return {"jpeg": np.array([self.sign * self._size(image) / 1000 for image in asked.images], np.float64)}

    def _size(self, image: np.ndarray) -> int:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=self.quality)
        return len(buffer.getvalue())
