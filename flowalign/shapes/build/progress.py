"""Resumable training of the builder's small networks: one safe file per stage, written by rename."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from flowalign.record.files import save_tensors


def _save(
    path: Path, model: nn.Module, average: dict[str, torch.Tensor], optimizer: torch.optim.Adam, step: int
) -> None:
    tensors = {f"model.{k}": v.contiguous().clone() for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v.contiguous().clone() for k, v in average.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{k}": torch.as_tensor(v).clone() for k, v in state.items()}
    draft = path.with_suffix(".part")
    save_tensors(tensors, draft, {"step": str(step)})
    os.replace(draft, path)


def _restore(path: Path, model: nn.Module, average: dict[str, torch.Tensor], optimizer: torch.optim.Adam) -> int:
    from safetensors import safe_open

    tensors = load_file(str(path))
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    average.update({k[4:]: v for k, v in tensors.items() if k.startswith("ema.")})
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    with safe_open(str(path), "pt") as file:
        return int(file.metadata()["step"])


def _scheduled(learning_rate: float, step: int, steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, cosine decay."""
    warm = min(1.0, (step + 1) / 100)
    decay = 0.5 * (1 + torch.cos(torch.tensor(step / steps * torch.pi)).item())
    return learning_rate * warm * max(decay, 0.02)


@torch.no_grad()
def _follow(average: dict[str, torch.Tensor], model: nn.Module, decay: float) -> None:
    """Take the model's weights into their exponential average; what is no float is copied."""
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            average[key].lerp_(value, 1 - decay)
        else:
            average[key].copy_(value)


def train(
    name: str,
    model: nn.Module,
    loss_at: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    *,
    work_dir: Path,
    steps: int,
    learning_rate: float,
    ema_decay: float = 0.999,
    save_every: int = 250,
) -> None:
    """Train ``model`` in place with AdamW, linear warm-up and cosine decay, and leave its EMA weights in it.

    ``loss_at(step)`` computes the loss of a step from that number alone, so that a run stopped at
    any time and started again continues as if nothing had happened. The state lies in
    ``work_dir/<name>.safetensors``.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / f"{name}.safetensors"
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    start = _restore(path, model, average, optimizer) if path.exists() else 0
    began = time.monotonic()
    model.train()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = _scheduled(learning_rate, step, steps)
        loss, metrics = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        _follow(average, model, min(ema_decay, (step + 1) / (step + 10)))
        if (step + 1) % save_every == 0 or step + 1 == steps:
            _save(path, model, average, optimizer, step + 1)
            line = {"stage": name, "step": step + 1, "of": steps, "loss": round(loss.item(), 5), **metrics}
            print(json.dumps(line | {"seconds": round(time.monotonic() - began, 1)}), flush=True)
    model.load_state_dict(average)
    model.eval()
