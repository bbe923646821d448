"""A small policy, data and updates that every engine can run, on one or several ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowalign.algorithm import LossOutput
from flowalign.config.updates import OptimizerConfig
from flowalign.engine.base import Engine, EngineSettings
from flowalign.flow.randomness import seeded
from flowalign.types import Max, TrainBatch
from tests.conditions import text_condition

ITEMS = 12
SETTINGS = {"learning_rate": 1e-2, "weight_decay": 0.05, "warmup_steps": 3, "max_grad_norm": 1.0}


class Network(nn.Module):
    """An MLP with a frozen layer, a parameter no loss uses and one that only odd updates use."""

    def __init__(self, frozen_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.first = nn.Linear(6, 17)
            self.frozen = nn.Linear(17, 17).to(frozen_dtype).requires_grad_(False)
            self.last = nn.Linear(17, 6)
            self.sometimes = nn.Parameter(torch.randn(5))
            self.never = nn.Parameter(torch.randn(3))
            self.row = nn.Parameter(torch.randn(1, 4))  # of two ranks one has none of it

    def forward(self, x: Tensor, use_sometimes: bool) -> Tensor:
        y = self.last(torch.tanh(self.frozen(torch.tanh(self.first(x)))))
        return y * self.sometimes.mean() + self.row.mean() if use_sometimes else y


def batch(step: int) -> TrainBatch:
    generator = seeded(3, step)
    x, y = (torch.randn(ITEMS, 6, generator=generator) for _ in range(2))
    condition = text_condition(
        torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.zeros(ITEMS).long(), torch.zeros(1, 1), y[0]
    )
    return TrainBatch({"x": x, "y": y}, condition, {"step": step})


def loss_of(network: nn.Module, poison: float = 0.0) -> Callable[[TrainBatch], LossOutput]:
    def loss(minibatch: TrainBatch) -> LossOutput:
        error = network(minibatch.tensors["x"], minibatch.shared["step"] % 2 == 1).float() - minibatch.tensors["y"]
        value = error.square().mean()
        mean = error.mean()
        return LossOutput(
            value + poison, {"error": mean, "max_by_name": mean, "replay/max_error": Max(error.abs().max())}
        )

    return loss


def update(engine: Engine, network: nn.Module, step: int, num_micro: int = 2, poison: float = 0.0) -> dict[str, float]:
    """Update ``step`` on this rank's share of its batch, in ``num_micro`` micro-batches."""
    share = torch.arange(ITEMS).tensor_split(engine.world_size)[engine.rank]
    micro = [batch(step).take(index) for index in share.tensor_split(num_micro)]
    return engine.step(loss_of(network, poison), micro, [len(m) / ITEMS for m in micro])


def settings(**changes: object) -> EngineSettings:
    """Settings of an engine; ``changes`` are its own or the optimizer's."""
    own = {key: value for key, value in changes.items() if key in EngineSettings.__dataclass_fields__}
    optimizer = OptimizerConfig.model_validate(SETTINGS | {key: changes[key] for key in changes.keys() - own.keys()})
    return EngineSettings(optimizer=optimizer, **own)  # type: ignore[arg-type]
