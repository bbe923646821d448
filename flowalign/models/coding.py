"""From latents to pixels and back, by an autoencoder with a scale and a shift, or one of films with moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The autoencoder of Stable Diffusion 3, which FLUX.1 and others have taken over: what its file says of its sizes.
SIXTEEN_CHANNELS: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 16,
    "layers_per_block": 2,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


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


def decode_frame(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents (N, C, h, w), each a film of one frame, to pixels (N, 3, H, W) about [-1, 1], float32.

    The latents of ``vae`` have a mean and a deviation a channel.
    """
    mean, deviation = _moments(vae, latents)
    # Divided by an inverse, as the public pipelines do: its last digit is another than a product's.
    z = latents.unsqueeze(2) / (1.0 / deviation) + mean
    return vae.decode(z.to(vae.dtype), return_dict=False)[0][:, :, 0].float()


def encode_frame(vae: Any, pixels: Tensor) -> Tensor:
    """Encode pixels (N, 3, H, W) in [-1, 1] as films of one frame to latents (N, C, h, w), float32: their mean."""
    encoded = vae.encode(pixels.unsqueeze(2)).latent_dist.mean.float()
    mean, deviation = _moments(vae, encoded)
    return ((encoded - mean) / deviation).squeeze(2)


def _moments(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of the latents, each (1, C, 1, 1, 1)."""
    config = vae.config
    mean, deviation = (torch.tensor(config[key]).to(like) for key in ("latents_mean", "latents_std"))
    return mean.view(1, -1, 1, 1, 1), deviation.view(1, -1, 1, 1, 1)
