"""The latent bank of the embedded world that the MM-DiT is pretrained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from flowalign.data.latents import LatentBank, save_bank
from flowalign.models.base import Policy
from flowalign.shapes.prompts import sample_prompt, scene
from flowalign.shapes.render import render


@torch.no_grad()
def make_bank(policy: Policy, directory: Path, *, num_images: int = 80_000, batch: int = 250, seed: int = 0) -> None:
    """Render training prompts, encode them with the policy's autoencoder (bf16 autocast), write the bank."""
    rng = np.random.default_rng([seed, 2])
    rows: dict[str, int] = {}
    latents, index = [], []
    for _ in range(num_images // batch):
        chosen = [sample_prompt("train", rng) for _ in range(batch)]
        images = np.stack([render(scene(row, rng), rng) for row in chosen])
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(policy.encode_images(torch.from_numpy(images)).half())
        index += [rows.setdefault(row["prompt"], len(rows)) for row in chosen]
    save_bank(directory, LatentBank(torch.cat(latents), torch.tensor(index), list(rows)))
