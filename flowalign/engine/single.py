"""The engine of one process: plain torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowalign.engine.accumulate import (
    AdamWEngine,
    MetricSum,
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
    own_share,
    read_state,
    set_learning_rate,
    write_state,
)
from flowalign.engine.base import EngineSettings, LossFn
from flowalign.engine.frozen_blocks import offload_blocks
from flowalign.engine.shards import Layout, undivided
from flowalign.record.destroyed import fault, total_norm
from flowalign.record.spans import span
from flowalign.types import TrainBatch


class TorchEngine(AdamWEngine):
    """Engine over ``torch.optim.AdamW``, on one rank."""

    name: ClassVar[str] = "torch"

    def __init__(self, network: nn.Module, settings: EngineSettings, *, device: torch.device | str = "cpu") -> None:
        super().__init__(settings, device)
        self._offload_frozen(network)
        self.network = network.to(self.device)
        self.layout, self._held = self._take(trainable_parameters(network))
        self._adamw = build_adamw(self._held.values(), settings)
        self._began = total_norm(self._held)

    def _offload_frozen(self, network: nn.Module) -> None:
        if self.settings.offload is not None:  # before the network moves: it may have no room on the device
            offload_blocks(network, self.settings.offload, self.device)

    def _take(self, trained: Mapping[str, nn.Parameter]) -> tuple[Layout, dict[str, Tensor]]:
        """Return what this rank steps of the ``trained`` parameters, and where it lies."""
        if self.settings.compile:
            self.network.compile()
        return undivided({name: tuple(p.shape) for name, p in trained.items()}), dict(trained)

    def step(self, loss_fn: LossFn, micro_batches: Sequence[TrainBatch], weights: Sequence[float]) -> dict[str, float]:
        check_share(micro_batches, weights)
        self._forget_gradients()
        total = MetricSum(self.device)
        for i, (micro_batch, weight) in enumerate(zip(micro_batches, weights, strict=True)):
            self._reduce_gradients(i == len(weights) - 1)
            with self.autocast():
                output = loss_fn(micro_batch)
            with span("backward"):
                weighted(output.loss, weight).backward()
            total.add(output, weight)
        metrics = total.reduce(self.world_size)
        grad_norm = self._clipped_norm()
        try:
            refuse_non_finite(metrics, grad_norm, self.steps)
            learning_rate = self.settings.learning_rate_at(self.steps)
            set_learning_rate(self._adamw, learning_rate)
            with span("optimizer"):
                self._adamw.step()
        finally:
            self._forget_gradients()
        self.steps += 1
        found = fault("the weights", self._held, began=self._began) or self._fault_of_moments()
        refuse_destroyed(found, learning_rate)
        return {**metrics, "grad_norm": grad_norm, "learning_rate": learning_rate}

    def _forget_gradients(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def _reduce_gradients(self, last: bool) -> None:
        """Say before a micro-batch whether it is the ``last``, so that its gradients are summed over ranks."""

    def _clipped_norm(self) -> float:
        """Clip the gradients, and return their norm before clipping."""
        for parameter in self._held.values():
            if parameter.grad is None:  # unused: decays like the others, as it does in DeepSpeed
                parameter.grad = torch.zeros_like(parameter)
        norm = self._norm([parameter.grad for parameter in self._held.values() if parameter.grad is not None])
        return self._clip(self._held.values(), norm)

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        return nn.utils.get_total_norm(gradients)

    def weights(self) -> dict[str, Tensor]:
        return self.layout.whole(self._held)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        self.layout.take(self._held, checked_weights(weights, self.layout.shapes))

    def held(self) -> dict[str, Tensor]:
        return self._held

    def publish(self) -> None:
        """Do nothing: what the optimizer steps is the network's own."""

    def optimizer_state(self) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        return read_state(self._adamw, self._held), self.facts()

    def load_optimizer_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        check_facts(facts, self.facts())
        own = own_share(tensors, facts, self.facts(), self.layout, self._held)
        write_state(self._adamw, self._held, own)
        self.steps = int(facts["steps"])

    def close(self) -> None:
        self._adamw.state.clear()
