"""Comparison of models: whether they mean the same by a prompt and by a latent, told from what they make of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.models.base import Policy

PROMPT = "a photo of two red circles"


@dataclass(frozen=True)
class Encoding:
    """Latent shape (C, h, w) of an image size, embeddings of a prompt, latents of an image with every grey level."""

    latent_shape: tuple[int, int, int]
    tokens: Tensor
    latents: Tensor

    def same_encoders(self, other: Encoding) -> bool:
        """Tell whether text encoders and autoencoder agree up to the rounding of a half-precision copy."""
        return _alike(self.tokens, other.tokens) and _alike(self.latents, other.latents)


def encoding(policy: Policy, length: int) -> Encoding:
    """Return a model's answers; ``length`` is that of the text."""
    network, encoders = policy.network, policy.encoders
    tokens = encoders.encode_prompts((PROMPT,), length).text["tokens"]
    image = torch.arange(64 * 64 * 3, dtype=torch.int32).remainder(256).to(torch.uint8).view(1, 64, 64, 3)
    latents = encoders.encode_images(image.to(tokens.device))
    return Encoding(network.latent_shape(), tokens.float().cpu(), latents.float().cpu())


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-2, atol=1e-2)
