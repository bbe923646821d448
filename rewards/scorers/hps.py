"""Human Preference Score v2 (Wu et al. 2023, arXiv:2306.09341): an open_clip ViT-H/14 tuned on human choices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from rewards.interface import Asked, SpecError
from rewards.models.batched import Batched
from rewards.models.openclip import OpenClip

if TYPE_CHECKING:
    import torch

Scale = Literal["cosine", "x100"]


class HpsScorer(Batched):
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
        super().__init__(device, batch_size)
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

    def load(self) -> None:
        self.model.setup(self.device)

    def values(self, asked: Asked) -> torch.Tensor:
        return self.factor * self.model.cosines(asked.images, asked.prompts)
