"""Puts the trained parts together as a real StableDiffusion3Pipeline directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

TEXT_TAIL = 2  # zero tokens in place of T5's, which runs of this model use


def new_transformer(
    joint_dim: int, pooled_dim: int, *, num_layers: int = 4, num_heads: int = 3, side: int = 8
) -> SD3Transformer2DModel:
    """Make a randomly initialised tiny MM-DiT, width 64·heads, QK-RMSNorm, 2 × 2 patches of side × side latents."""
    return SD3Transformer2DModel(
        sample_size=side,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=num_layers,
        attention_head_dim=64,
        num_attention_heads=num_heads,
        joint_attention_dim=joint_dim,
        caption_projection_dim=64 * num_heads,
        pooled_projection_dim=pooled_dim,
        pos_embed_max_size=side,
        qk_norm="rms_norm",
    )


def assemble(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    encoders: list[CLIPTextModelWithProjection],
    *,
    seed: int = 0,
    shift: float = 1.0,
) -> StableDiffusion3Pipeline:
    """Assemble a pipeline with a fresh transformer; pretraining replaces its weights."""
    torch.manual_seed(seed)
    joint = sum(int(e.config.hidden_size) for e in encoders)
    pooled = sum(int(e.config.projection_dim or 0) for e in encoders)
    return StableDiffusion3Pipeline(
        transformer=new_transformer(joint, pooled),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,  # type: ignore[arg-type]
        tokenizer_3=None,  # type: ignore[arg-type]
    )


def load(directory: Path) -> StableDiffusion3Pipeline:
    """Load a pipeline directory in float32; its T5 encoder is absent, which diffusers wants to be told."""
    return StableDiffusion3Pipeline.from_pretrained(
        str(directory), text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32, trust_remote_code=False
    )


def save_half(pipeline: StableDiffusion3Pipeline, directory: Path) -> None:
    """Save transformer and autoencoder in half precision; the text encoders stay float32.

    diffusers reads half weights into float32 modules, transformers keeps the dtype it finds: so a
    plain ``from_pretrained`` gives one float32 pipeline.
    """
    pipeline.transformer.half()
    pipeline.vae.half()
    pipeline.save_pretrained(str(directory), safe_serialization=True)
    for path in [directory / "model_index.json", *directory.glob("*/config.json")]:
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # the directory it was loaded from: of no use elsewhere
        path.write_text(json.dumps(config, indent=2) + "\n")
    (directory / "flowalign.json").write_text(json.dumps({"max_sequence_length": TEXT_TAIL}) + "\n")
