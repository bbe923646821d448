"""The half of a model that does not learn: text encoders and autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from flowalign.types import Condition, TextPart


class Encoders(Protocol):
    """Between people and latents: texts and pictures in, pictures out."""

    @property
    def device(self) -> torch.device: ...

    def to(self, device: str | torch.device) -> Encoders:
        """Move all parts, in place."""
        ...

    @property
    def text_parts(self) -> dict[str, TextPart]:
        """Where in a condition each text encoder's output lies, by the encoder's name."""
        ...

    def encode_prompts(self, prompts: Sequence[str], length: int) -> Condition:
        """One row for each distinct prompt, mapped back to all of them, plus the empty prompt's embeddings.

        ``length`` is that of the part of the text which a configuration chooses (``model.max_sequence_length``).
        """
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (N, C, h, w) of images, uint8 (N, H, W, 3): the posterior's mean."""
        ...

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) about [0, 1], float32, of latents (N, C, h, w); differentiable."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images, uint8 (N, H, W, 3), of latents (N, C, h, w)."""
        ...
