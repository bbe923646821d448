"""What a rollout worker and a learner's rank hold at most, beside what `flowalign plan` says of the same shapes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from gpu_bench import Bench, Figure
from gpu_models import KINDS, MODELS, blocks, inputs, shaped, updating

from flowalign.config.alignment import AlignConfig
from flowalign.engine.offload import Offload
from flowalign.plan import make_plan
from flowalign.plan.memory import Memory


def memory(bench: Bench) -> Iterator[Figure]:
    """Bytes of weights and at the peak, measured and planned, for the network alone: without autoencoder and texts."""
    for kind in KINDS:
        for name in MODELS:
            yield Figure(f"{name} rollout, {kind}", 5, partial(_rolls_out, bench, name, kind))
            yield Figure(f"{name} learner, {kind}", 6, partial(_learns, bench, name, kind))
            yield Figure(f"{name} learner, {kind}, offload host", 8, partial(_learns, bench, name, kind, offload=True))


def _rolls_out(bench: Bench, name: str, kind: str) -> dict[str, Any]:
    planned, frozen, model = _planned(bench, name, kind)
    before = bench.held()
    own = blocks(bench, model)
    weights = bench.held() - before
    x, t, condition = inputs(bench, own, bench.size.rolled)
    with bench.peak() as found, torch.no_grad():
        own.network.velocity(x, t, condition)
    said = planned.rollout_weights - frozen
    return _beside(weights, found["bytes"], said, planned.rollout_activations)


def _learns(bench: Bench, name: str, kind: str, offload: bool = False) -> dict[str, Any]:
    """Measure two updates: the optimizer's moments are there from the end of the first on.

    With ``offload`` the learner keeps on the host what it can, and the weights are those that are left.
    """
    planned, _, model = _planned(bench, name, kind, "host" if offload else "none")
    before = bench.held()
    own = blocks(bench, model)
    weights = bench.held() - before
    update = updating(bench, own, bench.size.micro, Offload("host", bench.folder) if offload else None)
    weights = bench.held() - before if offload else weights
    with bench.peak() as found:
        update(1)
        update(1)
    beyond = planned.learner_optimizer + planned.learner_working - planned.learner_offloaded
    return _beside(weights, found["bytes"], planned.learner_weights, beyond)


def _beside(weights: int, beyond: int, planned_weights: int, planned_beyond: int) -> dict[str, Any]:
    measured, planned = weights + beyond, planned_weights + planned_beyond
    found = {"weights": weights, "beyond": beyond, "peak": measured}
    said = {"weights": planned_weights, "beyond": planned_beyond, "peak": planned}
    return {"measured": found, "planned": said, "measured_of_planned": measured / planned}


def _planned(bench: Bench, name: str, kind: str, offload: str = "none") -> tuple[Memory, int, Any]:
    """Return the plan of a run at these shapes, the bytes of the frozen parts in it, and the run's model."""
    size, model = bench.size, shaped(bench, name, bench.size.pixels, **KINDS[kind])
    config = AlignConfig.model_validate(
        {
            "name": "memory",
            "iterations": 1,
            "model": model,
            "algorithm": {"type": "flow_grpo", "group_size": size.rolled, "num_steps": size.steps},
            "data": {"groups_per_iteration": 1},
            "rewards": ["jpeg"],
            "rollout": {"chunk_size": size.rolled},
            "learner": {"engine": "torch", "micro_batch_size": size.micro, "offload": offload},
            "cluster": {"backend": "local", "device": str(bench.device)},
            "evaluation": {"every": 0},
        }
    )
    plan = make_plan(config)
    return plan.memory, sum(plan.model.frozen.values()) * torch.finfo(getattr(torch, model.dtype)).bits // 8, model
