"""The second trained network of an algorithm that needs one: its copy of the policy, its engine, its checkpoint.

In a checkpoint it lies in the optimizer's part of each rank, beside the policy's tensors: weights as ``second:NAME``,
moments as ``KIND/second:NAME``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from flowalign.algorithm import Second
from flowalign.engine.adamw import divided
from flowalign.engine.base import Engine, EngineSettings, ResumeRefused
from flowalign.engine.convert import is_converted, load, whole
from flowalign.models.network import Network
from flowalign.record.checkpoint import OptimizerState

_MARK = "second:"  # no parameter's name has a colon


def second_network(policy: Network) -> Network:
    """Return a network with its own copy of the weights, which learns what the policy's learns, LoRA included."""
    own = policy.with_module(copy.deepcopy(policy.module))
    if policy.compiled:
        own.compile()
    return own


def second_settings(policy: EngineSettings, wanted: Second) -> EngineSettings:
    """Return the settings of its engine: the policy's, but for a learning rate that is constant."""
    rate = policy.optimizer.learning_rate if wanted.learning_rate is None else wanted.learning_rate
    constant = {"learning_rate": rate, "warmup_steps": 0, "decay_steps": None}
    return replace(policy, optimizer=policy.optimizer.model_copy(update=constant), schedule=None)


def second_state(engine: Engine) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Return the tensors that it and its optimizer hold, by names that no tensor of the policy has, and facts.

    This is a collective call.
    """
    moments, facts = engine.optimizer_state()
    tensors = {_MARK + name: tensor for name, tensor in engine.weights().items()}
    return {**tensors, **{name.replace("/", f"/{_MARK}", 1): tensor for name, tensor in moments.items()}}, facts


def is_second(name: str) -> bool:
    """Tell whether a tensor of a checkpoint is of the second network."""
    return _MARK in name


def states_for(saved: Mapping[int, OptimizerState], target: Mapping[str, Any]) -> list[OptimizerState]:
    """Return what each rank of an engine with the facts ``target`` goes on from, of what the ranks have ``saved``.

    It is what they have saved, or all of it put together where they shared it otherwise.

    Raises:
        ResumeRefused: it cannot be put together.
    """
    first, ranks = saved[min(saved)], range(target["world_size"])
    if not divided(first[1]):
        return [saved.get(rank, first) for rank in ranks]
    if not is_converted(first[1], target):
        return [saved[rank] for rank in ranks]
    tensors, facts = whole(saved)
    tensors = {**{name: tensor for name, tensor in first[0].items() if "/" not in name}, **tensors}
    if "second" in facts:
        moments, own = whole({rank: (held, said["second"]) for rank, (held, said) in saved.items()}, _MARK)
        tensors, facts = {**tensors, **moments}, {**facts, "second": own}
    return [(tensors, facts) for _ in ranks]


def restore_second(engine: Engine, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None) -> str | None:
    """Continue where `second_state` was taken, as `convert.load`; ``facts`` None: the checkpoint has none.

    Raises:
        ResumeRefused: the checkpoint holds no such network, or does not fit.
    """
    if facts is None:
        raise ResumeRefused("the checkpoint holds no second trained network; begin a run of another name")
    own = {name: tensor for name, tensor in tensors.items() if is_second(name)}
    weights = {name.removeprefix(_MARK): t for name, t in own.items() if name.startswith(_MARK)}
    moments = {name.replace(_MARK, "", 1): t for name, t in own.items() if not name.startswith(_MARK)}
    return load(engine, weights, (moments, facts))
