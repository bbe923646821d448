"""CLIP similarity with any open_clip model (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

import numpy as np

from rewards.interface import Images, Metadata
from rewards.models.openclip import OpenClip


class ClipScorer:
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
        self.model = OpenClip(self.name, path=path, model=model, checkpoint=checkpoint, precision=precision)
        self.device = device
        self.batch_size = batch_size

    def setup(self, device: str | None = None) -> None:
        """Load the model; raises ``SpecError`` where the weights are not its own."""
        self.device = device or self.device
        self.model.setup(self.device)

    def score(self, images: Images, prompts: list[str], metadata: list[Metadata]) -> dict[str, np.ndarray]:
        """``{"clip": (N,)}``; images (N, H, W, 3) of any size."""
        import torch

        values = []
        with torch.inference_mode():
            for start in range(0, len(images), self.batch_size):
                rows = slice(start, start + self.batch_size)
                cosine = (self.model.images(images[rows]) * self.model.texts(prompts[rows])).sum(-1)
                values.append(cosine.float().cpu().numpy())
        return {"clip": np.concatenate(values)}
