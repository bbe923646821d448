"""The engine without DeepSpeed: plain torch, data parallel by all-reducing gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flowalign.engine.accumulate import (
    MetricSum,
    autocast,
    check_share,
    checked_weights,
    refuse_destroyed,
    refuse_non_finite,
    trainable_parameters,
    weighted,
)
from flowalign.engine.adamw import (
    build_adamw,
    check_facts,
    held_state,
    layout_hash,
    read_state,
    set_learning_rate,
    write_state,
)
from flowalign.engine.base import EngineSettings, LossFn
from flowalign.engine.shards import undivided
from flowalign.record.destroyed import fault, fault_of_moments, total_norm
from flowalign.types import TrainBatch


class TorchEngine:
    """Engine over ``torch.optim.AdamW``; uses the default process group where ``world_size`` exceeds 1."""

    def __init__(
        self,
        network: nn.Module,
        settings: EngineSettings,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if world_size > 1 and not (dist.is_initialized() and dist.get_world_size() == world_size):
            raise RuntimeError(f"a world of {world_size} needs its process group first: use build_engine")
        self.rank, self.world_size = rank, world_size
        self.settings = settings
        self.device = torch.device(device)
        self.network = network.to(self.device)
        self.steps = 0
        self._rate: float | None = None
        self._parameters = trainable_parameters(network)
        if settings.compile:
            network.compile()
        self._optimizer = build_adamw(self._parameters.values(), settings)
        for tensor in self.network.state_dict().values() if world_size > 1 else ():
            dist.broadcast(tensor, 0)
        self.layout = undivided({name: tuple(p.shape) for name, p in self._parameters.items()})
        self._began = total_norm(self._parameters)

    def autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device, self.settings)

    def set_learning_rate(self, rate: float) -> None:
        self._rate = rate

    def step(self, loss_fn: LossFn, micro_batches: Sequence[TrainBatch], weights: Sequence[float]) -> dict[str, float]:
        check_share(micro_batches, weights)
        self._optimizer.zero_grad(set_to_none=True)
        total = MetricSum(self.device)
        for micro_batch, weight in zip(micro_batches, weights, strict=True):
            with self.autocast():
                output = loss_fn(micro_batch)
            weighted(output.loss, weight).backward()
            total.add(output, weight)
        metrics = total.reduce(self.world_size)
        grad_norm = self._clipped_norm()
        try:
            refuse_non_finite(metrics, grad_norm, self.steps)
            learning_rate = self._rate if self._rate is not None else self.settings.learning_rate_at(self.steps)
            set_learning_rate(self._optimizer, learning_rate)
            self._optimizer.step()
        finally:
            self._optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        moments = held_state(self._optimizer, self._parameters)
        found = fault("the weights", self._parameters, began=self._began) or fault_of_moments(moments)
        refuse_destroyed(found, learning_rate)
        return {**metrics, "grad_norm": grad_norm, "learning_rate": learning_rate}

    def _clipped_norm(self) -> float:
        """Sum the gradients over ranks, clip them, and return their norm before clipping."""
        parameters = list(self._parameters.values())
        for parameter in parameters:
            if parameter.grad is None:  # unused: decays like the others, as it does in DeepSpeed
                parameter.grad = torch.zeros_like(parameter)
            if self.world_size > 1:
                dist.all_reduce(parameter.grad)
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if self.settings.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.settings.max_grad_norm, norm)
        return float(norm)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in self._parameters.items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        checked = checked_weights(weights, self.layout.shapes)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(checked[name])

    def held(self) -> dict[str, Tensor]:
        return dict(self._parameters)

    def publish(self) -> None:
        """Do nothing: what the optimizer steps is the network's own."""

    def optimizer_state(self) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        return read_state(self._optimizer, self._parameters), self._facts()

    def load_optimizer_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        check_facts(facts, self._facts())
        write_state(self._optimizer, self._parameters, tensors)
        self.steps = int(facts["steps"])

    def _facts(self) -> dict[str, Any]:
        return {
            "engine": "torch",
            "world_size": self.world_size,
            "rank": self.rank,
            "zero_stage": 0,
            "steps": self.steps,
            "learning_rate": self.settings.learning_rate_at(self.steps),
            "layout": layout_hash(self.layout.shapes),
        }

    def close(self) -> None:
        self._optimizer.state.clear()
