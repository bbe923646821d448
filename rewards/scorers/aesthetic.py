"""Aesthetic score: a small head on CLIP image features (LAION's improved-aesthetic-predictor and its kin)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from rewards.interface import Asked, SpecError, one_line
from rewards.missing import hint
from rewards.models.batched import Batched
from rewards.models.linear import Layers, applied, chain
from rewards.models.openclip import OpenClip

if TYPE_CHECKING:
    import torch


class AestheticScorer(Batched):
    """``aesthetic``: a head on unit CLIP image embeddings, about 1 to 10 for LAION's; the prompt plays no part.

    ``head`` is a safetensors file: one linear layer (``weight`` (1, D), ``bias`` (1,)), or several applied one after
    another without activation, as in LAION's ``sac+logos+ava1-l14-linearMSE`` (its layers ``layers.0.weight`` …;
    convert the published ``.pth`` once with ``safetensors``, nothing here unpickles). The CLIP model is given as to
    ``clip``; LAION's head wants ``model: ViT-L-14-quickgelu`` with OpenAI's weights, ``checkpoint: openai`` or a file
    of them.
    """

    name = "aesthetic"
    range = (-np.inf, np.inf)

    def __init__(
        self,
        *,
        head: str,
        path: str | None = None,
        model: str | None = None,
        checkpoint: str | None = None,
        precision: str = "fp32",
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        super().__init__(device, batch_size)
        if not os.path.isfile(head):
            raise SpecError(
                f"aesthetic: head {head} does not exist{hint(head)}; give a safetensors file of linear layers"
            )
        self.head = head
        self.model = OpenClip(self.name, path=path, model=model, checkpoint=checkpoint, precision=precision)
        self._layers: Layers = []

    def load(self) -> None:
        """Load model and head; raises ``SpecError`` where the head is no chain of linear layers that fits the model."""
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        self.model.setup(self.device)
        try:
            tensors = load_file(self.head, device=self.device)
        except (SafetensorError, OSError) as error:
            raise SpecError(f"aesthetic: {self.head} is no safetensors file ({one_line(error)})") from error
        layers = chain(self.name, self.head, tensors)
        with torch.inference_mode():
            width = self.model.images(np.zeros((1, 1, 1, 3), np.uint8)).shape[1]
        if layers[0][0].shape[1] != width:
            raise SpecError(
                f"aesthetic: {self.head} takes {layers[0][0].shape[1]} features, the CLIP model gives {width}; "
                "use the model that the head was trained on"
            )
        self._layers = layers

    def values(self, asked: Asked) -> torch.Tensor:
        return applied(self._layers, self.model.images(asked.images))
