"""The 8×-downsampling, 16-channel AutoencoderKL of the embedded world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from flowalign.shapes.build.progress import train
from flowalign.shapes.prompts import sample_prompt, scene
from flowalign.shapes.render import render

KL_WEIGHT = 1e-3


def images_at(step: int, batch: int, seed: int) -> np.ndarray:
    """Return the training images of a step, uint8 (batch, 64, 64, 3)."""
    rng = np.random.default_rng([seed, step])
    return np.stack([render(scene(sample_prompt("train", rng), rng), rng) for _ in range(batch)])


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """Convert uint8 (N, H, W, 3) to float32 (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def new_autoencoder() -> AutoencoderKL:
    blocks: dict[str, Any] = {  # annotated in diffusers as tuples of one
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (16, 32, 64, 64),
    }
    return AutoencoderKL(
        **blocks,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def train_autoencoder(work_dir: Path, *, steps: int, batch: int = 16, seed: int = 0) -> AutoencoderKL:
    """Train to reconstruct, then set scaling and shift so that latents have zero mean and unit variance."""
    torch.manual_seed(seed)
    vae = new_autoencoder()

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        pixels = to_pixels(images_at(step, batch, seed))
        with torch.autocast("cpu", torch.bfloat16):
            (posterior,) = vae.encode(pixels, return_dict=False)
            noise = torch.randn(posterior.mean.shape, generator=generator)
            drawn: Any = posterior.mean + posterior.std * noise
            recon = vae.decode(drawn, return_dict=False)[0]
        error = recon.float() - pixels
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss = error.abs().mean() + 2 * error.square().mean() + KL_WEIGHT * kl
        return loss, {"l1": round(error.abs().mean().item(), 5), "kl": round(kl.item(), 3)}

    train("autoencoder", vae, loss_at, work_dir=work_dir, steps=steps, learning_rate=2e-3)
    with torch.no_grad():
        held_out = [to_pixels(images_at(10**6 + i, 64, seed)) for i in range(16)]
        latents = torch.cat([vae.encode(pixels, return_dict=False)[0].mean for pixels in held_out])
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    return vae
