"""Feature maps of predicted images, with gradients: what a perceptual loss compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from flowalign.models.encoders import Encoders
from flowalign.models.errors import ModelError
from rewards.interface import SpecError
from rewards.models.openclip import OpenClip


class ImageFeatures:
    """Maps of all layers of an open_clip image tower over decoded latents; tower and decoder are frozen.

    In place of LPIPS's VGG, whose weights need a download; the tower is any directory in open_clip's layout.
    (arXiv:1801.03924, sec. 3: distances of channel-normalised maps)

    Raises:
        ModelError: ``directory`` is none such, or its architecture gives no intermediate maps.
    """

    def __init__(self, encoders: Encoders, directory: Path) -> None:
        clip = OpenClip("features", path=str(directory))
        try:
            clip.setup(str(encoders.device))
        except SpecError as error:
            raise ModelError(str(error)) from error
        self._tower: Any = clip.loaded.visual.requires_grad_(False)
        if not hasattr(self._tower, "forward_intermediates"):
            raise ModelError(f"features: the image tower of {directory} gives no intermediate maps; choose a ViT")
        cfg = self._tower.preprocess_cfg
        self._mean, self._std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        size = self._tower.image_size
        self._size = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        self._encoders = encoders

    def __call__(self, latents_NCHW: Tensor) -> list[Tensor]:
        """Return a map (N, C, h, w) of each layer, differentiable in the latents (N, C, H, W)."""
        pixels = self._encoders.decode_pixels(latents_NCHW).clamp(0, 1)
        if pixels.shape[-2:] != self._size:
            pixels = interpolate(pixels, self._size, mode="bicubic", antialias=True)
        pixels = (pixels - self._mean.to(pixels.device)) / self._std.to(pixels.device)
        return self._tower.forward_intermediates(pixels, intermediates_only=True)["image_intermediates"]
