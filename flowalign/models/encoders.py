"""The half of a model that does not learn: text encoders and autoencoder.

Shapes: N samples, C h w latents, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flowalign.conditions import cat_rows
from flowalign.models.errors import ModelError
from flowalign.models.family import ModelFamily
from flowalign.types import Condition

CACHED_PROMPTS = 512


class Encoders:
    """Between people and latents: texts and pictures in, pictures out.

    ``pipeline`` is one of the family's whose network has no weights; all else is frozen and in eval mode.
    """

    def __init__(self, family: ModelFamily, pipeline: Any) -> None:
        self.family, self.pipeline = family, pipeline
        self.vae = pipeline.vae
        if all(weight.ndim <= 4 for weight in self.vae.parameters()):
            self.vae.to(memory_format=torch.channels_last)  # faster convolutions on a CPU
        for part in self.modules:
            part.requires_grad_(False).eval()
        self._encode = lru_cache(maxsize=CACHED_PROMPTS)(self._encode_one)

    @property
    def text_encoders(self) -> list[torch.nn.Module]:
        """Those that were loaded."""
        parts = (getattr(self.pipeline, name, None) for name in self.family.text)
        return [part for part in parts if isinstance(part, torch.nn.Module)]

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Autoencoder and text encoders."""
        return [self.vae, *self.text_encoders]

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def to(self, device: str | torch.device) -> Encoders:
        """Move all parts, in place."""
        for part in self.modules:
            part.to(device)
        self._encode.cache_clear()
        return self

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], length: int) -> Condition:
        """Encode each distinct prompt as one row, mapped back to all prompts, plus the empty prompt.

        Each is encoded once and alone, so that its embedding never depends on its batch. ``length`` is that of the part
        of the text which a configuration chooses (``model.max_sequence_length``).
        """
        if not self.text_encoders:
            raise ModelError("the text encoders of this model were not loaded")
        rows = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        encoded = [self._encode(prompt, length) for prompt in [*rows, ""]]
        return Condition(
            text=cat_rows(encoded[:-1]),
            null=encoded[-1],
            index_N=torch.tensor([rows[prompt] for prompt in prompts], device=self.device),
            null_N=torch.zeros(len(prompts), dtype=torch.long, device=self.device),
        )

    def _encode_one(self, prompt: str, length: int) -> dict[str, Tensor]:
        return self.family.encode(self.pipeline, prompt, length)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (N, C, h, w) to images, uint8 (N, H, W, 3)."""
        pixels = self.decode_pixels(latents)
        return pixels.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Decode latents (N, C, h, w) to pixels (N, 3, H, W) about [0, 1], float32; differentiable."""
        return self.family.decode(self.vae, latents) / 2 + 0.5

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images, uint8 (N, H, W, 3), to latents (N, C, h, w): the posterior's mean."""
        pixels = images.permute(0, 3, 1, 2).to(self.vae.dtype).div(127.5).sub(1)
        return self.family.encode_pictures(self.vae, pixels)
