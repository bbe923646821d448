"""Moves what the optimizers of a learner's ranks have saved to another number of ranks, ZeRO stage or engine."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowalign.engine.adamw import STATE_KEYS, divided
from flowalign.engine.base import Engine, ResumeRefused
from flowalign.record.checkpoint import OptimizerState

KINDS = ("exp_avg", "exp_avg_sq", "master")


def is_converted(facts: Mapping[str, Any], target: Mapping[str, Any]) -> bool:
    """Tell whether a state with ``facts`` moves where ``target`` (engine, ZeRO stage, world size) goes on from it."""
    return any(facts.get(key) != target[key] for key in ("engine", "zero_stage", "world_size"))


def described(facts: Mapping[str, Any]) -> str:
    """Say which engine a state is of: ``deepspeed with ZeRO 2 on 2 ranks``."""
    ranks, stage = facts["world_size"], facts["zero_stage"]
    return f"{facts['engine']}{f' with ZeRO {stage}' * (stage > 0)} on {ranks} rank{'s' * (ranks > 1)}"


def whole(saved: Mapping[int, OptimizerState], mark: str = "") -> OptimizerState:
    """Put the states of all ranks together: each moment, and each master copy, as one tensor a parameter.

    ``mark`` begins the names after ``KIND/``. Tensors of other names are left out. The facts are those of a state that
    every engine splits for itself.

    Raises:
        ResumeRefused: a rank's part is missing, or an older version has not recorded how they were split.
    """
    tensors, facts = saved[min(saved)]
    if not divided(facts):
        return tensors, facts
    if "pieces" not in facts or set(saved) != set(range(facts["world_size"])):
        raise ResumeRefused(
            f"the optimizer state of {described(facts)} lacks a rank's part, or how it was split: go on with as many "
            "ranks and the same engine"
        )
    found: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    step = None
    for part, own in saved.values():
        for held, pieces in own["pieces"].items():
            step = part.get(f"step/{mark}{held}") if step is None else step
            for kind in KINDS:
                if (flat := part.get(f"{kind}/{mark}{held}")) is None:
                    continue
                for name, begin, length, offset in pieces:
                    values = flat.reshape(-1)[offset : offset + length]
                    found[f"{kind}/{mark}{name}"].append((begin, values))
    made = {}
    for key, parts in found.items():
        shape = facts["shapes"][key.partition("/")[2].removeprefix(mark)]
        values = torch.cat([values for _, values in sorted(parts, key=lambda part: part[0])])
        if values.numel() != math.prod(shape):
            raise ResumeRefused(f"optimizer state {key} has {values.numel()} of {math.prod(shape)} values")
        made[key] = values.view(shape)
    if step is not None:
        made |= {f"step/{mark}{name}": step for name in facts["shapes"]}
    return made, {**facts, "divided": False}


def load(engine: Engine, weights: Mapping[str, Tensor], state: OptimizerState) -> str | None:
    """Load weights and an optimizer's state; return a line on it where they were another engine's.

    This is a collective call.

    Raises:
        ResumeRefused: the state does not fit.
    """
    engine.load_weights(weights)
    tensors, facts = state
    engine.load_optimizer_state(tensors, facts)
    if not is_converted(facts, engine.facts()):
        return None
    far = distance(engine, weights, tensors)
    return (
        f"the optimizer's state of {described(facts)} is converted to {described(engine.facts())}: weights and moments "
        f"differ from what was saved by at most {far:g}"
    )


def distance(engine: Engine, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> float:
    """Return the largest difference between what ``engine`` now holds and a `whole` state with its ``weights``.

    Weights are asked of the network itself. This is a collective call.
    """
    pairs = [(weight, weights[name]) for name, weight in engine.weights().items()]
    pairs += [(master, weights[name]) for name in weights if (master := tensors.get(f"master/{name}")) is not None]
    held = engine.moments()
    for kind in STATE_KEYS[:2]:
        own = {name: held[f"{kind}/{name}"] for name in engine.held() if f"{kind}/{name}" in held}
        if own:
            pairs += [(moment, tensors[f"{kind}/{name}"]) for name, moment in engine.layout.whole(own).items()]
    return max(float((one.cpu() - other.cpu()).abs().max()) for one, other in pairs if one.numel())
