"""The half of a model that does not learn: text encoders and autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flowalign.types import Condition


@dataclass(frozen=True)
class TextPart:
    """The place of one text encoder's output in a `Condition`: tokens [begin, end) and their features, pooled features.

    An ``end`` of None is the end of the text, whose length may vary.
    """

    tokens: tuple[int, int | None]
    features: tuple[int, int]
    pooled: tuple[int, int]


class Encoders(Protocol):
    """Between people and latents: texts and pictures in, pictures out."""

    @property
    def device(self) -> torch.device: ...

    def to(self, device: str | torch.device) -> Encoders:
        """Move all parts, in place."""
        ...

    @property
    def text_parts(self) -> dict[str, TextPart]:
        """The place of each text encoder's output in a condition, by the encoder's name."""
        ...

    def encode_prompts(self, prompts: Sequence[str], length: int) -> Condition:
        """Encode each distinct prompt as one row, mapped back to all prompts, plus the empty prompt.

        ``length`` is that of the part of the text which a configuration chooses (``model.max_sequence_length``).
        """
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images, uint8 (N, H, W, 3), to latents (N, C, h, w): the posterior's mean."""
        ...

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Decode latents (N, C, h, w) to pixels (N, 3, H, W) about [0, 1], float32; differentiable."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (N, C, h, w) to images, uint8 (N, H, W, 3)."""
        ...
