"""From latents to pixels and back, by an autoencoder with a scale and a shift."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def decode_scaled(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents (N, C, h, w) to pixels (N, 3, H, W) about [-1, 1], float32; differentiable."""
    config = vae.config
    z = latents / config["scaling_factor"] + (config["shift_factor"] or 0.0)
    return vae.decode(z.to(vae.dtype), return_dict=False)[0].float()


def encode_scaled(vae: Any, pixels: Tensor) -> Tensor:
    """Encode pixels (N, 3, H, W) in [-1, 1] to latents (N, C, h, w), float32: the posterior's mean."""
    config = vae.config
    mean = vae.encode(pixels).latent_dist.mean.float()
    return (mean - (config["shift_factor"] or 0.0)) * config["scaling_factor"]
