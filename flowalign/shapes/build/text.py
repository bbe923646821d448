"""Tokenizer and open_clip model of the embedded world."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from flowalign.record.files import save_tensors
from flowalign.shapes.build.autoencoder import to_pixels
from flowalign.shapes.build.progress import train
from flowalign.shapes.prompts import prompts, sample_prompt, scene
from flowalign.shapes.render import render

CONTEXT_LENGTH = 16
_EMBED = 96


def new_tokenizer() -> CLIPTokenizer:
    """Make CLIP's byte-level BPE reduced to the merges that spell this world's words; any text still tokenizes."""
    full = SimpleTokenizer()
    words = {w for split in ("train", "eval") for row in prompts(split) for w in row["prompt"].split()}
    used: set[tuple[str, str]] = set()
    ranks = {pair: rank for pair, rank in full.bpe_ranks.items()}
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            used.add(best)
            at = pairs.index(best)
            parts[at : at + 2] = ["".join(best)]
    merges: Any = sorted(used, key=ranks.__getitem__)  # pairs, which the annotation does not foresee
    base = list(full.byte_encoder.values())
    names = [*base, *(b + "</w>" for b in base), *("".join(m) for m in merges), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(names)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT_LENGTH)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Return the token ids, int64 (N, 16), padded with the end token."""
    return tokenizer(
        texts, padding="max_length", max_length=CONTEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def new_text_encoder(
    tokenizer: CLIPTokenizer, width: int, activation: str, *, layers: int = 2
) -> CLIPTextModelWithProjection:
    special: dict[str, Any] = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    config = CLIPTextConfig(
        **special,
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=CONTEXT_LENGTH,
        hidden_act=activation,
        initializer_factor=1.0,
    )
    return CLIPTextModelWithProjection(config)


def open_clip_config(vocab_size: int) -> dict[str, Any]:
    """Return the ``open_clip_config.json`` of the tiny model, loadable as ``local-dir:``."""
    return {
        "model_cfg": {
            "embed_dim": _EMBED,
            "vision_cfg": {"image_size": 64, "layers": 3, "width": 96, "head_width": 32, "patch_size": 8},
            "text_cfg": {
                "context_length": CONTEXT_LENGTH,
                "vocab_size": vocab_size,
                "width": 96,
                "heads": 3,
                "layers": 2,
                "hf_tokenizer_name": "shapes",
            },
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"},
    }


def contrastive_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """Compute the symmetric InfoNCE in which every copy of a caption counts as positive; ``same`` is (N, N) bool."""
    logits = scale * image @ text.T
    target = same.float() / same.float().sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_open_clip(
    work_dir: Path, tokenizer: CLIPTokenizer, *, steps: int, batch: int = 128, seed: int = 0
) -> open_clip.CLIP:
    """Train the two towers by contrast of renders with their prompts."""
    torch.manual_seed(seed)
    config = open_clip_config(len(tokenizer))["model_cfg"]
    config["text_cfg"].pop("hf_tokenizer_name")
    clip = open_clip.CLIP(**config)

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.default_rng([seed, 1, step])
        rows = [sample_prompt("train", rng) for _ in range(batch)]
        pixels = to_pixels(np.stack([render(scene(row, rng), rng) for row in rows]))
        ids = tokenize(tokenizer, [row["prompt"] for row in rows])
        same = (ids[:, None] == ids[None]).all(-1)
        with torch.autocast("cpu", torch.bfloat16):
            image, text = clip.encode_image(pixels, normalize=True), clip.encode_text(ids, normalize=True)
        loss = contrastive_loss(image.float(), text.float(), clip.logit_scale.exp().clamp(max=100), same)
        right = same[torch.arange(batch), (image.float() @ text.float().T).argmax(1)].float().mean().item()
        return loss, {"top1": round(right, 3)}

    train("open_clip", clip, loss_at, work_dir=work_dir, steps=steps, learning_rate=1e-3)
    return clip


def save_open_clip(clip: nn.Module, tokenizer: CLIPTokenizer, directory: Path) -> None:
    """Write ``open_clip_config.json``, half-precision weights and the tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "open_clip_config.json").write_text(json.dumps(open_clip_config(len(tokenizer)), indent=2) + "\n")
    half = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in clip.state_dict().items()}
    save_tensors(half, directory / "open_clip_model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(directory)
