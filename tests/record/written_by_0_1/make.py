"""Write the files of version 0.1 that `tests.record.test_what_0_1_wrote` reads.

At commit 0f34c54, in an empty folder, with its checkout in ``PYTHONPATH``: ``python -P path/to/make.py``, then
``tar --sort=name --mtime=@0 --owner=0 --group=0 -cJf made.tar.xz made``. Weights that nothing is learned from repeat a
short pattern, which packs well.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.shapes.build.text import new_text_encoder, new_tokenizer


def pattern(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        values = torch.linspace(-0.3, 0.5, 8).repeat(parameter.numel() // 8 + 1)
        parameter.data.copy_(values[: parameter.numel()].view_as(parameter))


def write_pipeline(directory: Path) -> None:
    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    encoders = [new_text_encoder(tokenizer, 64, activation) for activation in ("quick_gelu", "gelu")]
    blocks: dict[str, Any] = {
        "block_out_channels": (4, 4, 4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    vae = AutoencoderKL(
        **blocks,
        latent_channels=16,
        norm_num_groups=2,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5,
        shift_factor=0.1,
        sample_size=64,
    )
    for module in (*encoders, vae):
        pattern(module)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=128,
        caption_projection_dim=16,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    absent: Any = None
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=absent,
        tokenizer_3=absent,
    )
    pipeline.save_pretrained(str(directory), safe_serialization=True)


def command(*arguments: str) -> None:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, (arguments, done.output, done.exception)


def main() -> None:
    made = Path("made")
    made.mkdir()
    os.chdir(made)
    write_pipeline(Path("pipeline"))
    (Path("pictures")).mkdir()
    captions = []
    for index, color in enumerate(("red", "green", "blue", "yellow")):
        Image.new("RGB", (64, 64), color).save(f"pictures/{index}.png")
        captions.append(f'{{"file_name": "{index}.png", "text": "a {color} picture"}}')
    Path("pictures/metadata.jsonl").write_text("\n".join(captions) + "\n")
    Path("bright.py").write_text(
        "def bright(images, prompts, metadata):\n    return images.reshape(len(images), -1).mean(1) / 255.0\n"
    )
    model = {"path": "pipeline", "max_sequence_length": 16}
    align: dict[str, Any] = {
        "runs_dir": "runs",
        "iterations": 2,
        "data": {"groups_per_iteration": 2},
        "algorithm": {"type": "flow_grpo", "group_size": 4, "num_steps": 4},
        "rewards": [{"spec": "bright.py:bright"}],
        "rollout": {"chunk_size": 8},
        "learner": {"engine": "torch", "micro_batch_size": 8, "ema_decay": 0.9},
        "evaluation": {"every": 2, "num_samples": 4, "num_steps": 3},
        "checkpoint": {"every": 1, "keep_last": 1},
        "cluster": {"backend": "local", "threads": 1},
        "logging": {"wandb": "disabled"},
    }
    command(
        "precompute",
        "pictures",
        "--to",
        "bank",
        "--model",
        "pipeline",
        "--embeddings",
        "float16",
        "--max-sequence-length",
        "16",
    )
    command(
        "make-preferences",
        "pipeline",
        "--reward",
        "bright.py:bright",
        "--pairs",
        "4",
        "--group-size",
        "4",
        "--num-steps",
        "3",
        "--out",
        "preferences",
    )
    offline = {
        "data": {"groups_per_iteration": 2, "preferences": "preferences"},
        "rewards": [],
        "algorithm": {"type": "diffusion_dpo", "source": "offline", "beta": 100},
        "learner": {"engine": "torch", "micro_batch_size": 2},
        "evaluation": {"every": 0},
    }
    for name, changes in {"full": {}, "lora": {}, "dpo": offline}.items():
        own = {**model, "lora": {"rank": 2}} if name == "lora" else model
        Path(f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "model": own, **align, **changes}))
        command("align", f"{name}.yaml")
    trained = {
        "name": "base",
        "runs_dir": "runs",
        "model": {**model, "family": "rf"},
        "latents": "bank",
        "algorithm": {"type": "rectified_flow", "family": "rf", "density": "logit_normal"},
        "batch_size": 2,
        "phases": [{"steps": 2, "learning_rate": 1e-3, "final_learning_rate": 1e-4}],
        "warmup_steps": 0,
        "ema_decay": 0.9,
        "threads": 1,
        "log_every": 1,
        "checkpoint_every": 1,
        "keep_last": 1,
    }
    Path("base.yaml").write_text(yaml.safe_dump(trained))
    command("pretrain", "base.yaml")
    command("export", "runs/full", "--to", "exported", "--as", "pipeline")
    command("export", "runs/lora", "--to", "adapter", "--as", "lora")


if __name__ == "__main__":
    main()
