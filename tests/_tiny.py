"""Real files, tiny and random: a StableDiffusion3Pipeline directory, a run's configuration and its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from flowalign.config.alignment import AlignConfig
from flowalign.models.build import load_policy
from flowalign.record.checkpointwriter import CheckpointWriter
from flowalign.samples.opened import base_hash
from flowalign.shapes.build.autoencoder import new_autoencoder
from flowalign.shapes.build.pipeline import new_transformer
from flowalign.shapes.build.text import new_text_encoder, new_tokenizer


def write_pipeline(directory: Path, *, shift: float = 3.0) -> Path:
    """A pipeline with one transformer block, its weights in half precision."""
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    encoders = [new_text_encoder(tokenizer, 64, activation) for activation in ("quick_gelu", "gelu")]
    vae = new_autoencoder()
    vae.register_to_config(scaling_factor=1.5, shift_factor=0.1)
    absent: Any = None
    pipeline = StableDiffusion3Pipeline(
        transformer=new_transformer(128, 128, num_layers=1, num_heads=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=absent,
        tokenizer_3=absent,
    )
    pipeline.to(torch.float16).save_pretrained(str(directory), safe_serialization=True)
    return directory


def run_config(pipeline: Path, *, lora: bool = False, **changes: Any) -> AlignConfig:
    """A small run over ``pipeline``; ``changes`` replace whole sections."""
    model = {"path": str(pipeline), "max_sequence_length": 16, "lora": {"rank": 4, "alpha": 6} if lora else None}
    content = {
        "name": "tiny",
        "iterations": 20,
        "model": model,
        "algorithm": {"type": "flow_grpo", "group_size": 4},
        "rewards": [{"spec": "geneval", "options": {"mode": "partial"}}],
        "rollout": {"chunk_size": 8},
        "cluster": {"backend": "local", "threads": 1},
        "evaluation": {"num_samples": 12, "num_steps": 4},
    }
    return AlignConfig.model_validate({**content, **changes})


def write_checkpoint(
    run_dir: Path, config: AlignConfig, *, step: int = 10, metrics: dict[str, float] | None = None
) -> Path:
    """A checkpoint whose weights, and differently its EMA, have moved away from the base model."""
    policy = load_policy(config.model)
    moved = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        moved.append(
            {
                name: p.detach() + 0.05 * torch.randn(p.shape, generator=generator)
                for name, p in policy.network.named_parameters()
                if p.requires_grad
            }
        )
    state = {
        "iteration": step,
        "version": step,
        "base_hash": base_hash(Path(config.model.path)),
        "metrics": metrics or {},
    }
    return CheckpointWriter(run_dir / "checkpoints").save(step, model=moved[0], ema=moved[1], state=state)
