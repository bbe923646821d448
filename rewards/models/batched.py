"""A scorer that asks one model in batches: device, loading and the loop over the images, once for all of them.

Shapes: N images, n of one batch, H W pixels.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rewards.interface import Answers, Asked

if TYPE_CHECKING:
    import torch


class Batched(Answers):
    """Answers one float32 score an image, by its own name, from ``values`` of at most ``batch_size`` images at a time.

    The model is loaded by ``setup``, or by the first batch where nobody has called that.
    """

    name: str
    range: tuple[float, float]

    def __init__(self, device: str, batch_size: int) -> None:
        self.device = device
        self.batch_size = batch_size
        self._is_loaded = False

    @abstractmethod
    def load(self) -> None:
        """Load the model onto ``self.device``; raises ``SpecError`` where its files do not make one."""

    @abstractmethod
    def values(self, asked: Asked) -> torch.Tensor:
        """Return the float32 scores (n,) of a batch of uint8 images (n, H, W, 3) of any size.

        It is called without gradients, after ``load``.
        """

    def setup(self, device: str | None = None) -> None:
        """Load the model, onto ``device`` where one is given; raises ``SpecError`` as ``load``."""
        self.device = device or self.device
        self.load()
        self._is_loaded = True

    def answer(self, asked: Asked) -> dict[str, NDArray[np.float32]]:
        """Return ``{name: (N,)}``; images of any size."""
        import torch

        if not self._is_loaded:
            self.setup()
        values = []
        with torch.inference_mode():
            for start in range(0, len(asked), self.batch_size):
                part = asked.take(slice(start, start + self.batch_size))
                values.append(self.values(part).cpu().numpy())
        return {self.name: np.concatenate(values)}
