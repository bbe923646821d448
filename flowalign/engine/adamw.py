"""AdamW and its state as plain named tensors: what checkpoints hold instead of pickles."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from flowalign.engine.base import EngineSettings, ResumeRefused

logger = logging.getLogger(__name__)
STATE_KEYS = ("exp_avg", "exp_avg_sq", "step")


def build_adamw(parameters: Iterable[Tensor], settings: EngineSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, **settings.optimizer.of_adamw)


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def read_state(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the copies on the CPU of the moments and step of each named tensor (none before the first update)."""
    return {
        f"{key}/{name}": value.detach().to("cpu", copy=True)
        for name, tensor in named.items()
        for key, value in optimizer.state.get(tensor, {}).items()
    }


def held_state(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the moments themselves, by the names that ``read_state`` gives their copies."""
    return {
        f"{key}/{name}": value
        for name, tensor in named.items()
        for key, value in optimizer.state.get(tensor, {}).items()
        if key != "step"
    }


def write_state(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Write moments and steps that `read_state` has read, bit for bit.

    Raise ResumeRefused before anything is changed.
    """
    started = any(f"{STATE_KEYS[0]}/{name}" in tensors for name in named)
    for name, tensor in named.items() if started else ():
        for key in STATE_KEYS:
            found = tensors.get(f"{key}/{name}")
            shape = torch.Size() if key == "step" else tensor.shape
            if found is None or found.shape != shape:
                what = "missing" if found is None else f"of shape {tuple(found.shape)}"
                raise ResumeRefused(f"optimizer state {key}/{name} is {what}, this engine needs {tuple(shape)}")
    optimizer.state.clear()
    for name, tensor in named.items() if started else ():
        state = {key: tensors[f"{key}/{name}"] for key in STATE_KEYS}
        # torch keeps the step of a non-capturable AdamW on the CPU.
        optimizer.state[tensor] = {
            key: value.to("cpu" if key == "step" else tensor.device, torch.float32, copy=True)
            for key, value in state.items()
        }


def layout_hash(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Hash the names and shapes of the trainable parameters, in order."""
    return hashlib.sha256(repr([(name, tuple(shape)) for name, shape in shapes.items()]).encode()).hexdigest()


def check_facts(facts: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise ResumeRefused, in one sentence, unless a state with ``facts`` fits an engine with ``mine``.

    Without ZeRO every rank holds the same full state, so there the world size and the engine may change.
    """
    missing = {"world_size", "rank", "zero_stage", "steps", "layout"} - set(facts)
    if missing:
        raise ResumeRefused(f"this is not an optimizer state of flowalign: its facts lack {', '.join(sorted(missing))}")
    if not isinstance(facts["steps"], int) or facts["steps"] < 0:
        raise ResumeRefused(f"the optimizer state counts {facts['steps']} updates: go on from another checkpoint")
    if facts["layout"] != mine["layout"]:
        raise ResumeRefused(
            "the optimizer state belongs to other trainable parameters (names or shapes differ): resume with the "
            "model and LoRA settings of the checkpoint"
        )
    theirs = f"world size {facts['world_size']}, ZeRO stage {facts['zero_stage']}"
    ours = f"world size {mine['world_size']}, ZeRO stage {mine['zero_stage']}"
    if facts["zero_stage"] == mine["zero_stage"] == 0:
        if theirs != ours:
            logger.warning("optimizer state of %s converted to %s: every rank holds all of it", theirs, ours)
    elif theirs != ours or facts["rank"] != mine["rank"]:
        raise ResumeRefused(
            f"the optimizer state was written with {theirs} (rank {facts['rank']}) and cannot be split for {ours} "
            f"(rank {mine['rank']}): resume with the former, or start a new run from the checkpoint's weights"
        )
