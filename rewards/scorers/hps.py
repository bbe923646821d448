"""Human Preference Score v2 (Wu et al. 2023, arXiv:2306.09341): an open_clip ViT-H/14 tuned on human choices."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from rewards.interface import Images, Metadata, SpecError
from rewards.models.openclip import OpenClip

Scale = Literal["cosine", "x100"]


class HpsScorer:
    """``hps``: cosine similarity of image and prompt under HPS weights, about 0.2 to 0.35 for photographs.

    The published checkpoints (``HPS_v2_compressed.pt``, ``HPS_v2.1_compressed.pt``) are state dicts of
    ``model: ViT-H-14``, the default; give one as ``checkpoint``. As in HPSv2 the image is shown whole, padded with
    black where it is not square. A directory (``path``) is taken as the ``clip`` scorer takes it and brings its own
    preprocessing. ``scale: x100`` is the form that leaderboards print.
    """

    name = "hps"

    def __init__(
        self,
        *,
        path: str | None = None,
        model: str | None = None,
        checkpoint: str | None = None,
        precision: str = "fp32",
        scale: Scale = "cosine",
        device: str = "cpu",
        batch_size: int = 32,
    ) -> None:
        if scale not in get_args(Scale):
            raise SpecError(f"hps: scale {scale!r} is unknown; write {' or '.join(get_args(Scale))}")
        if path is None and model is None and checkpoint is not None:
            model = "ViT-H-14"
        self.model = OpenClip(
            self.name,
            path=path,
            model=model,
            checkpoint=checkpoint,
            precision=precision,
            resize_mode="longest" if path is None else None,
        )
        self.factor = 100.0 if scale == "x100" else 1.0
        self.range = (-self.factor, self.factor)
        self.device = device
        self.batch_size = batch_size

    def setup(self, device: str | None = None) -> None:
        """Load the model; raises ``SpecError`` where the weights are not its own."""
        self.device = device or self.device
        self.model.setup(self.device)

    def score(self, images: Images, prompts: list[str], metadata: list[Metadata]) -> dict[str, np.ndarray]:
        """``{"hps": (N,)}``; images (N, H, W, 3) of any size."""
        import torch

        values = []
        with torch.inference_mode():
            for start in range(0, len(images), self.batch_size):
                rows = slice(start, start + self.batch_size)
                cosine = (self.model.images(images[rows]) * self.model.texts(prompts[rows])).sum(-1)
                values.append(self.factor * cosine.cpu().numpy())
        return {"hps": np.concatenate(values)}
