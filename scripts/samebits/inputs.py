"""Writes what both checkouts are given: pipelines, rewards, prompts, pictures and pairs."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

REWARD = """
import numpy as np
def reward(images, prompts, metadata):
    return images.reshape(len(images), -1).mean(1) / 255.0
def red(images, prompts, metadata):
    return images[..., 0].reshape(len(images), -1).mean(1) / 255.0 - images.reshape(len(images), -1).mean(1) / 300.0
def gaps(images, prompts, metadata):
    scores = images.reshape(len(images), -1).mean(1) / 255.0
    return np.where((images.reshape(len(images), -1).sum(1) % 3) == 0, np.nan, scores)
"""

PROMPTS = [
    {"prompt": "a photo of a red circle", "tag": "one"},
    {"prompt": "a photo of a blue square", "tag": "two"},
    {"prompt": "a photo of a green triangle and a red square", "tag": "two"},
]


def build_inputs(folder: Path) -> None:
    """Write what both checkouts are given: pipelines, rewards, prompts, pictures and pairs."""
    folder.mkdir(parents=True)
    (folder / "bright.py").write_text(REWARD)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    _pipeline(folder / "model", seed=0, shift=1.0)
    _other_network(folder / "model", folder / "teacher", seed=1)
    _other_network(folder / "model", folder / "teacher2", seed=2)
    _pictures(folder)


def _pipeline(folder: Path, *, seed: int, shift: float) -> None:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    from flowalign.shapes.build.autoencoder import new_autoencoder
    from flowalign.shapes.build.pipeline import new_transformer
    from flowalign.shapes.build.text import new_text_encoder, new_tokenizer

    torch.manual_seed(seed)
    tokenizer, absent = new_tokenizer(), None
    encoders = [new_text_encoder(tokenizer, 64, activation) for activation in ("quick_gelu", "gelu")]
    vae = new_autoencoder()
    vae.register_to_config(scaling_factor=1.3, shift_factor=0.1)
    parts: dict[str, Any] = {
        "transformer": new_transformer(128, 128, num_layers=2, num_heads=1),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=shift),
        "vae": vae,
        "text_encoder": encoders[0],
        "tokenizer": tokenizer,
        "text_encoder_2": encoders[1],
        "tokenizer_2": tokenizer,
        "text_encoder_3": absent,
        "tokenizer_3": absent,
    }
    StableDiffusion3Pipeline(**parts).save_pretrained(str(folder))


def _other_network(model: Path, folder: Path, *, seed: int) -> None:
    import torch

    from flowalign.shapes.build.pipeline import new_transformer

    shutil.copytree(model, folder)
    torch.manual_seed(seed)
    new_transformer(128, 128, num_layers=2, num_heads=1).save_pretrained(str(folder / "transformer"))


def _pictures(folder: Path) -> None:
    import numpy as np
    from datasets import Dataset
    from PIL import Image

    def picture(level: int, seed: int) -> bytes:
        draw, file = np.random.default_rng([seed, level]), io.BytesIO()
        Image.fromarray((level + draw.integers(-15, 16, (64, 64, 3))).astype(np.uint8)).save(file, format="PNG")
        return file.getvalue()

    pairs = [
        {
            "jpg_0": picture(20, i),
            "jpg_1": picture(220, i),
            "label_0": 0,
            "label_1": 1,
            "caption": PROMPTS[i % 3]["prompt"],
        }
        for i in range(5)
    ]
    Dataset.from_list(pairs).to_parquet(str(folder / "pairs.parquet"))
    rows = [
        {
            "image": picture(16 + 15 * i, i),
            "caption": PROMPTS[i % 3]["prompt"],
            "alt": f"picture {i}",
        }
        for i in range(14)
    ]
    Dataset.from_list(rows).to_parquet(str(folder / "pictures.parquet"))
