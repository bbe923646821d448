"""AdamW and its state as plain named tensors: what checkpoints hold instead of pickles."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from flowalign.engine.base import EngineSettings, ResumeRefused
from flowalign.engine.piecewise import PiecewiseAdamW
from flowalign.engine.shards import Layout

STATE_KEYS = ("exp_avg", "exp_avg_sq", "step")
_NONE = torch.empty(0, 0)


def build_adamw(parameters: Iterable[Tensor], settings: EngineSettings) -> torch.optim.AdamW:
    if settings.offload is not None:
        return PiecewiseAdamW(parameters, settings.offload, **settings.optimizer.of_adamw)
    return torch.optim.AdamW(parameters, **settings.optimizer.of_adamw)


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def read_state(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the copies on the CPU of the moments and step of each named tensor (none before the first update)."""
    piecewise = optimizer if isinstance(optimizer, PiecewiseAdamW) else None
    return {
        f"{key}/{name}": piecewise.copied(value, tensor) if piecewise else value.detach().to("cpu", copy=True)
        for name, tensor in named.items()
        for key, value in optimizer.state.get(tensor, {}).items()
    }


def held_state(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the moments themselves, by the names that ``read_state`` gives their copies."""
    return {
        f"{key}/{name}": value.to(tensor.device)
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
    states = {
        tensor: {key: tensors[f"{key}/{name}"] for key in STATE_KEYS}
        for name, tensor in (named.items() if started else ())
    }
    if isinstance(optimizer, PiecewiseAdamW):
        optimizer.hold(states)
        return
    optimizer.state.clear()
    for tensor, state in states.items():
        # torch keeps the step of a non-capturable AdamW on the CPU.
        optimizer.state[tensor] = {
            key: value.to("cpu" if key == "step" else tensor.device, torch.float32, copy=True)
            for key, value in state.items()
        }


def layout_hash(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Hash the names and shapes of the trainable parameters, in order."""
    return hashlib.sha256(repr([(name, tuple(shape)) for name, shape in shapes.items()]).encode()).hexdigest()


def check_facts(facts: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise ResumeRefused, in one sentence, unless a state with ``facts`` is of the trained parameters of ``mine``."""
    missing = {"engine", "world_size", "rank", "zero_stage", "steps", "layout"} - set(facts)
    if missing:
        raise ResumeRefused(f"this is not an optimizer state of flowalign: its facts lack {', '.join(sorted(missing))}")
    if not isinstance(facts["steps"], int) or facts["steps"] < 0:
        raise ResumeRefused(f"the optimizer state counts {facts['steps']} updates: go on from another checkpoint")
    if facts["layout"] != mine["layout"]:
        raise ResumeRefused(
            "the optimizer state belongs to other trainable parameters (names or shapes differ): resume with the "
            "model and LoRA settings of the checkpoint"
        )


def divided(facts: Mapping[str, Any]) -> bool:
    """Tell whether a state with ``facts`` is a rank's share: else every rank has saved all of it, by parameter."""
    return bool(facts.get("divided", facts["zero_stage"] > 0))


def own_share(
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    mine: Mapping[str, Any],
    layout: Layout,
    held: Mapping[str, Tensor],
) -> Mapping[str, Tensor]:
    """Return what a state holds of the tensors ``held`` of the rank with the facts ``mine``: itself, or its part.

    Raises:
        ResumeRefused: it is another rank's share, or lacks a parameter.
    """
    if not divided(facts):
        return _split(tensors, layout, held) if divided(mine) else tensors
    keys = ("engine", "zero_stage", "world_size", "rank")
    if any(facts[key] != mine[key] for key in keys):
        theirs, ours = (", ".join(f"{key} {of[key]}" for key in keys) for of in (facts, mine))
        raise ResumeRefused(f"the share of {theirs} is not that of {ours}: a state is put together before it moves")
    return tensors


def _split(tensors: Mapping[str, Tensor], layout: Layout, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own: dict[str, Tensor] = {}
    for kind in (*STATE_KEYS[:2], "master"):
        there = {name: tensors[f"{kind}/{name}"] for name in layout.shapes if f"{kind}/{name}" in tensors}
        if not there:
            continue
        if lacking := [name for name, shape in layout.shapes.items() if there.get(name, _NONE).shape != shape]:
            raise ResumeRefused(f"optimizer state {kind}/{lacking[0]} is missing, or of another shape")
        parts = {name: torch.zeros(tensor.shape) for name, tensor in held.items()}
        layout.take(parts, there)
        own |= {f"{kind}/{name}": part for name, part in parts.items()}
    steps = [tensor for name, tensor in tensors.items() if name.startswith("step/")]
    return own | {f"step/{name}": steps[0] for name in held if steps}
