"""The published SD3.5 recipes, run for one iteration on a small random model of the same architecture, T5 included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from flowalign.config.sections import ModelConfig
from flowalign.intake.file import load_align
from flowalign.models.build import load_encoders
from flowalign.models.families.sd3 import FAMILY
from flowalign.record import checkpoint
from flowalign.record.metrics import read_metrics
from flowalign.run.drive import drive
from tests.tiny import write_pipeline

MEDIUM = FAMILY.published["stable-diffusion-3.5-medium"].parts["transformer"]

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "sd3"
SMALL = [
    "model.height=64",
    "model.width=64",
    "model.max_sequence_length=16",
    "data.prompts=shapes:train",
    "data.groups_per_iteration=2",
    "algorithm.group_size=4",
    "rewards=[{spec: jpeg}]",
    "rollout.chunk_size=4",
    "learner.micro_batch_size=4",
    "learner.zero_stage=0",
    "learner.ranks=1",
    "cluster={backend: local, threads: 1, device: cpu}",
    "evaluation.scorer=null",
    "evaluation.prompts=shapes:eval",
    "evaluation.num_samples=6",
    "evaluation.num_steps=2",
    "logging.wandb=disabled",
    "iterations=1",
]


@pytest.fixture(scope="module")
def sd35_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD3.5-medium's architecture (dual attention, QK-RMSNorm, three text encoders), two layers of it."""
    from diffusers import SD3Transformer2DModel
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(0)
    t5 = T5Tokenizer()
    changes = {
        "sample_size": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "caption_projection_dim": 64,
        "joint_attention_dim": 160,
        "pooled_projection_dim": 128,
        "pos_embed_max_size": 16,
        "dual_attention_layers": [0],
    }
    text = T5Config(vocab_size=len(t5), d_model=160, d_kv=32, d_ff=128, num_layers=1, num_heads=2)
    return write_pipeline(
        tmp_path_factory.mktemp("sd35"),
        half=False,
        transformer=SD3Transformer2DModel(**{**MEDIUM, **changes}),
        text_encoder_3=T5EncoderModel(text),
        tokenizer_3=t5,
    )


@pytest.mark.parametrize("name", ["flow_grpo_geneval", "flow_grpo_pickscore"])
def test_a_published_recipe_runs_on_a_small_model_of_its_architecture(sd35_dir, tmp_path, name):
    overrides = [*SMALL, f"model.path={sd35_dir}", f"runs_dir={tmp_path}"]
    loaded = load_align(CONFIGS / f"{name}.yaml", overrides)
    assert loaded.config.algorithm["shift"] == 3.0
    run_dir = drive(loaded.config, loaded.base_dir, Console(quiet=True))
    row = read_metrics(run_dir / "metrics.jsonl")[-1]
    assert row["iteration"] == 1 and row["grad_norm"] > 0
    # bf16: the rollout's weights are bf16, the learner's adapter float32 under autocast. Close, and said so.
    assert 0 <= row["replay/max_abs_dlogp"] < 0.05
    saved = checkpoint.load(run_dir / "checkpoints" / "step_000001")
    assert saved.model and all("lora" in key for key in saved.model) and saved.ema is not None


def test_the_t5_part_of_the_text_is_encoded_and_not_zero(sd35_dir):
    encoders = load_encoders(ModelConfig(path=str(sd35_dir)))
    condition = encoders.encode_prompts(["a photo of a red circle"], 16)
    clip_tokens = encoders.pipeline.tokenizer_max_length
    assert condition.text["tokens"].shape == (1, clip_tokens + 16, 160)
    assert bool((condition.text["tokens"][:, clip_tokens:] != 0).any())
