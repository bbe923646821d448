"""A LoRA as PEFT or diffusers saves it, and runs that begin from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from flowalign.config.sections import LoraConfig, ModelConfig
from flowalign.models.family import family_of
from flowalign.record.metrics import read_metrics, without_times
from tests.families.ours import LENGTH, write_run
from tests.families.public import public_pipeline

RANK, ALPHA = 3, 5.0


def write_adapter(base: Path, name: str, folder: Path, layout: str, **changes: Any) -> Path:
    """Save a LoRA whose factors are all drawn, as the library of ``layout`` saves it; ``diffusers`` knows no alpha."""
    pipeline = public_pipeline(base)
    module = pipeline.transformer
    targets = list(family_of(name.partition("-")[0]).lora_targets)
    alpha = RANK if layout == "diffusers" else ALPHA
    config = PeftConfig(**{"r": RANK, "lora_alpha": alpha, "target_modules": targets, **changes})
    module.add_adapter(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    state: Any = get_peft_model_state_dict(module)
    if layout == "peft":
        module.peft_config["default"].save_pretrained(str(folder))
        save_file({f"base_model.model.{n}": w for n, w in state.items()}, folder / "adapter_model.safetensors")
    else:
        said = {"transformer_lora_adapter_metadata": config.to_dict()} if layout == "metadata" else {}
        if said:
            said["transformer_lora_adapter_metadata"]["target_modules"] = targets
        type(pipeline).save_lora_weights(str(folder), transformer_lora_layers=state, **said)
    return folder


def run_of(folder: Path, base: Path, lora: str, text: str = "") -> Path:
    path = write_run(folder, base, text)
    content = path.read_text().replace("lora: {rank: 4, alpha: 6}", f"lora: {lora}").replace("once", folder.name)
    path.write_text(content.replace("type: flow_grpo,", "type: flow_grpo, beta: 0.1,"))
    return path


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [without_times(row) for row in read_metrics(folder / "runs" / folder.name / "metrics.jsonl")]


def model_of(base: Path, path: Path, **lora: Any) -> ModelConfig:
    return ModelConfig(path=str(base), max_sequence_length=LENGTH, lora=LoraConfig(path=str(path), **lora))
