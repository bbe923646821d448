"""Real files, tiny and random: pipeline directories with and without weights, a run's configuration, its checkpoints.

Nothing of weight is imported before it is used: tests of configurations alone load neither torch nor diffusers here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowalign.config.alignment import AlignConfig
    from flowalign.config.training import PretrainConfig

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
INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": [None, None],
    "tokenizer_3": [None, None],
}
PARTS["vae"] |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}


def write_pipeline(
    directory: Path,
    *,
    shift: float = 3.0,
    scaling: float = 1.5,
    offset: float = 0.1,
    half: bool = True,
    **parts: Any,
) -> Path:
    """Write a StableDiffusion3Pipeline with one transformer block; the same seed, so the same weights, every time.

    ``parts`` (``transformer=``, ``text_encoder_3=``, …) replace or add components; ``half`` stores half precision.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    from flowalign.shapes.build.autoencoder import new_autoencoder
    from flowalign.shapes.build.pipeline import new_transformer
    from flowalign.shapes.build.text import new_text_encoder, new_tokenizer

    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    encoders = [new_text_encoder(tokenizer, 64, activation) for activation in ("quick_gelu", "gelu")]
    vae = new_autoencoder()
    vae.register_to_config(scaling_factor=scaling, shift_factor=offset)
    components: dict[str, Any] = {
        "transformer": new_transformer(128, 128, num_layers=1, num_heads=1),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=shift),
        "vae": vae,
        "text_encoder": encoders[0],
        "tokenizer": tokenizer,
        "text_encoder_2": encoders[1],
        "tokenizer_2": tokenizer,
        "text_encoder_3": None,
        "tokenizer_3": None,
    }
    pipeline = StableDiffusion3Pipeline(**{**components, **parts})
    pipeline.to(torch.float16 if half else torch.float32).save_pretrained(str(directory))
    return directory


def write_configs_of_a_pipeline(directory: Path, *, shift: float = 2.5) -> Path:
    """Write the configuration files of a pipeline alone: enough to check and to plan a run, without weights."""
    for name, content in {**PARTS, "scheduler": {"shift": shift}}.items():
        (directory / name).mkdir(parents=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (directory / name / file).write_text(json.dumps(content))
    (directory / "model_index.json").write_text(json.dumps(INDEX))
    return directory


def write_config(directory: Path, text: str = "") -> Path:
    """Write a small valid run over ``directory/model``, with more YAML appended."""
    if not (directory / "model").exists():
        write_configs_of_a_pipeline(directory / "model")
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


def run_config(pipeline: Path, *, lora: bool = False, **changes: Any) -> AlignConfig:
    """Return a small run over ``pipeline``; ``changes`` replace whole sections."""
    from flowalign.config.alignment import AlignConfig

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


def encoded_here(config: PretrainConfig) -> PretrainConfig:
    """Encode the captions of a run in this process, which has imported what that takes; return the configuration.

    A run does so in a process that ends (`flowalign.run.encoded`), which costs a test ten seconds of imports.
    """
    from flowalign.data.feed import tables
    from flowalign.models.build import load_encoders

    lacking = [table for table in tables(config) if not table.path.is_file()]
    encoders = load_encoders(config.model) if lacking else None
    for table in lacking:
        assert encoders is not None
        table.write(encoders)
    return config


def write_checkpoint(
    run_dir: Path, config: AlignConfig, *, step: int = 10, metrics: dict[str, float] | None = None
) -> Path:
    """Write a checkpoint whose weights, and differently its EMA, have moved away from the base model."""
    import torch

    from flowalign.models.build import load_policy
    from flowalign.record.checkpointwriter import CheckpointWriter
    from flowalign.samples.opened import base_hash

    policy = load_policy(config.model)
    moved = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        moved.append(
            {
                name: p.detach() + 0.05 * torch.randn(p.shape, generator=generator)
                for name, p in policy.network.module.named_parameters()
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


def merged(own: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``own`` with ``changes``, section by section; an algorithm is replaced whole."""
    sections = {key for key in changes if isinstance(changes[key], dict) and isinstance(own.get(key), dict)}
    inner = {key: merged(own[key], changes[key]) for key in sections - {"algorithm"}}
    return {**own, **changes, **inner}
