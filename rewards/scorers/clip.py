"""CLIP similarity with any open_clip model (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewards.interface import Asked
from rewards.models.batched import Batched
from rewards.models.openclip import OpenClip

if TYPE_CHECKING:
    import torch


class ClipScorer(Batched):
    """``clip`` in [-1, 1]: cosine similarity of image and prompt.

    The model is a directory with ``open_clip_config.json`` and weights (``path``), or an open_clip architecture
    (``model``, such as ``ViT-L-14``) with ``checkpoint``, a local file or a tag that open_clip knows and may download.
    ``precision`` is open_clip's: fp32, fp16, bf16.
    """

    name = "clip"
    range = (-1.0, 1.0)

    def __init__(
        self,
        *,
        path: str | None = None,
        model: str | None = None,
        checkpoint: str | None = None,
        precision: str = "fp32",
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        super().__init__(device, batch_size)
        self.model = OpenClip(self.name, path=path, model=model, checkpoint=checkpoint, precision=precision)

    def load(self) -> None:
        self.model.setup(self.device)

    def values(self, asked: Asked) -> torch.Tensor:
        return self.model.cosines(asked.images, asked.prompts)
