"""A StableDiffusion3Pipeline directory of configuration files alone: enough to check and to plan, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
PARTS: dict[str, dict[str, Any]] = {
    "transformer": {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 8,
        "qk_norm": "rms_norm",
    },
    "vae": {"_class_name": "AutoencoderKL", "latent_channels": 16, "block_out_channels": [32, 32, 32, 32]},
    "text_encoder": {**TEXT, "projection_dim": 32, "vocab_size": 64, "max_position_embeddings": 24},
    "text_encoder_2": {**TEXT, "projection_dim": 32, "vocab_size": 64, "max_position_embeddings": 24},
}
PARTS["vae"] |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}


def write_model_directory(directory: Path, *, shift: float = 2.5) -> Path:
    for name, content in {**PARTS, "scheduler": {"shift": shift}}.items():
        (directory / name).mkdir(parents=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (directory / name / file).write_text(json.dumps(content))
    (directory / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    return directory


def write_config(directory: Path, text: str = "") -> Path:
    """A small valid run over ``directory/model``, with more YAML appended."""
    if not (directory / "model").exists():
        write_model_directory(directory / "model")
    path = directory / "run.yaml"
    path.write_text(
        "name: tiny\n"
        "iterations: 4\n"
        "model: {path: model, max_sequence_length: 16}\n"
        "data: {groups_per_iteration: 3}\n"
        "algorithm: {type: flow_grpo, group_size: 4, num_steps: 10, window: {kind: fixed, start: 1, size: 2}}\n"
        "rewards: [{spec: geneval, options: {mode: partial}}]\n"
        "learner: {micro_batch_size: 8, engine: torch}\n"
        "cluster: {backend: local, threads: 1}\n" + text
    )
    return path
