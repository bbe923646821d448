"""The tiny PickScore of the embedded world: a transformers CLIPModel trained on preference pairs.

Of two images the one that satisfies the prompt wins; of two that do, the cleaner render.
(Pick-a-Pic, Kirstain et al. 2023, arXiv:2305.01569, sec. 3: cross-entropy of the two scaled similarities)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from flowalign.shapes.build.autoencoder import to_pixels
from flowalign.shapes.build.progress import train
from flowalign.shapes.build.text import CONTEXT_LENGTH, contrastive_loss, tokenize
from flowalign.shapes.prompts import Metadata, prompts, sample_prompt, scene
from flowalign.shapes.render import render


def new_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": CONTEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 64,
        "patch_size": 8,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))


def degrade(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a dirtier copy of a render, uint8 (64, 64, 3): noise, or a ghost of itself a few pixels away."""
    pixels = image.astype(np.float32)
    if rng.random() < 0.5:
        pixels += rng.normal(0, rng.uniform(12, 40), pixels.shape)
    else:
        pixels = 0.5 * pixels + 0.5 * np.roll(pixels, tuple(rng.integers(2, 5, size=2)), axis=(0, 1))
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def pair(row: Metadata, pool: list[Metadata], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return winner and loser images for a prompt: a near miss of the same task, or a degraded render."""
    winner = render(scene(row, rng), rng)
    if rng.random() < 0.3:
        return winner, degrade(render(scene(row, rng), rng), rng)
    other = pool[int(rng.integers(len(pool)))]
    while other["prompt"] == row["prompt"]:
        other = pool[int(rng.integers(len(pool)))]
    return winner, render(scene(other, rng), rng)


def train_pickscore(
    work_dir: Path, tokenizer: CLIPTokenizer, *, steps: int, batch: int = 64, seed: int = 0
) -> CLIPModel:
    """Pair loss plus an in-batch contrastive loss on the winners."""
    torch.manual_seed(seed)
    model = new_model(tokenizer)
    pools = {tag: [r for r in prompts("train") if r["tag"] == tag] for tag in {r["tag"] for r in prompts("train")}}

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.default_rng([seed, 4, step])
        rows = [sample_prompt("train", rng) for _ in range(batch)]
        pairs = [pair(row, pools[row["tag"]], rng) for row in rows]
        pixels = to_pixels(np.stack([image for image, _ in pairs] + [image for _, image in pairs]))
        ids = tokenize(tokenizer, [row["prompt"] for row in rows])
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=ids, pixel_values=pixels)
        scale = model.logit_scale.exp().clamp(max=100)
        image, text = F.normalize(out.image_embeds.float(), dim=-1), F.normalize(out.text_embeds.float(), dim=-1)
        winners, losers = image[:batch], image[batch:]
        margin = scale * ((winners - losers) * text).sum(-1)
        same = (ids[:, None] == ids[None]).all(-1)
        loss = F.softplus(-margin).mean() + contrastive_loss(winners, text, scale, same)
        return loss, {"pair_accuracy": round((margin > 0).float().mean().item(), 3)}

    train("pickscore", model, loss_at, work_dir=work_dir, steps=steps, learning_rate=1e-3)
    return model


def save_pickscore(model: CLIPModel, tokenizer: CLIPTokenizer, directory: Path) -> None:
    """Write a CLIPModel directory with its processor, weights in half precision."""
    model.half().save_pretrained(directory)
    model.float()
    images = CLIPImageProcessor(
        size={"height": 64, "width": 64}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    CLIPProcessor(images, tokenizer).save_pretrained(directory)
