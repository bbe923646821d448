"""Parts that all engines share: facts, trainable parameters, weighted losses, metrics summed over ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flowalign.algorithm import LossOutput
from flowalign.engine import process_group
from flowalign.engine.adamw import held_state, layout_hash
from flowalign.engine.base import EngineSettings, NonFiniteUpdate
from flowalign.engine.piecewise import PiecewiseAdamW
from flowalign.engine.shards import Layout
from flowalign.record.destroyed import MAX_MOMENTS, DestroyedState, fault_of_moments
from flowalign.types import Max, value_of


class AdamWEngine(ABC):
    """What the engines have in common, each of which steps an AdamW over the tensors ``held``."""

    name: ClassVar[str]
    rank, world_size = 0, 1
    layout: Layout
    _adamw: torch.optim.Optimizer

    def __init__(self, settings: EngineSettings, device: torch.device | str) -> None:
        self.settings, self.device = settings, torch.device(device)
        self.steps = 0

    @abstractmethod
    def held(self) -> dict[str, Tensor]: ...

    def autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device, self.settings.dtype)

    def moments(self) -> dict[str, Tensor]:
        return held_state(self._adamw, self.held())

    def _fault_of_moments(self) -> str | None:
        if isinstance(self._adamw, PiecewiseAdamW) and self._adamw.norm_of_moments() <= MAX_MOMENTS:
            return None  # known from the step itself: they are not brought in once more
        return fault_of_moments(self.moments())

    def facts(self) -> dict[str, Any]:
        return {
            "engine": self.name,
            "world_size": self.world_size,
            "rank": self.rank,
            "zero_stage": self.settings.zero_stage,
            "steps": self.steps,
            "learning_rate": self.settings.learning_rate_at(self.steps),
            "layout": layout_hash(self.layout.shapes),
            **self.layout.facts(),
        }

    def _clip(self, parameters: Iterable[Tensor], norm: Tensor) -> float:
        """Clip the gradients whose norm is ``norm``, and return that."""
        if self.settings.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(list(parameters), self.settings.max_grad_norm, norm)
        return float(norm)


def trainable_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name.

    They become float32 in place, frozen ones stay as loaded.
    """
    found = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError("the network has no trainable parameter: every requires_grad is False")
    for parameter in found.values():
        parameter.data = parameter.data.float()
    return found


def checked_weights(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Tensor]:
    """Return ``weights`` if names and shapes are exactly those of the trainable parameters.

    Otherwise raise ValueError.
    """
    missing, foreign = sorted(set(shapes) - set(weights)), sorted(set(weights) - set(shapes))
    if missing or foreign:
        raise ValueError(
            f"weights do not fit the trainable parameters: {len(missing)} missing (first: {missing[:1]}), "
            f"{len(foreign)} unknown (first: {foreign[:1]})"
        )
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"weight {name} has shape {tuple(weights[name].shape)}, the network has {shape}")
    return weights


def autocast(device: torch.device | str, dtype: str) -> AbstractContextManager[Any]:
    """Return bf16 autocast on ``device``, or nothing for float32."""
    return nullcontext() if dtype == "float32" else torch.autocast(torch.device(device).type, torch.bfloat16)


def weighted(loss: Tensor, weight: float) -> Tensor:
    """Return ``weight * loss``, whose gradient is NaN where the loss is not finite.

    The gradient norm is the one number every rank agrees on before an update, so a loss that is
    infinite with a finite gradient, on one rank alone, must show in it.
    """
    finite = torch.isfinite(loss.detach())
    return loss * torch.where(finite, weight, math.nan).to(loss.dtype)


class MetricSum:
    """Loss and metrics of one update, on the device until ``reduce``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.values: dict[str, Tensor] = {}
        self._maxima: set[str] = set()

    def add(self, output: LossOutput, weight: float) -> None:
        for name, metric in {**output.metrics, "loss": output.loss}.items():
            value = torch.as_tensor(value_of(metric)).detach().to(self.device, torch.float64)
            if not isinstance(metric, Max):
                zero = torch.zeros((), device=self.device, dtype=torch.float64)
                self.values[name] = self.values.get(name, zero) + value * weight
            else:
                self._maxima.add(name)
                none = torch.full((), -math.inf, device=self.device, dtype=torch.float64)
                self.values[name] = torch.maximum(self.values.get(name, none), value if weight else none)

    def reduce(self, world_size: int) -> dict[str, float]:
        """Return the sums (or maxima) over micro-batches and ranks; a collective call."""
        sums = sorted(name for name in self.values if name not in self._maxima)
        maxima = sorted(name for name in self.values if name in self._maxima)
        result: dict[str, float] = {}
        for names, how in ((sums, dist.ReduceOp.SUM), (maxima, dist.ReduceOp.MAX)):
            if names:
                stacked = torch.stack([self.values[name] for name in names])
                if world_size > 1:
                    dist.all_reduce(stacked, op=how)
                result.update(zip(names, stacked.tolist(), strict=True))
        return result


def check_share(micro_batches: Sequence[Any], weights: Sequence[float]) -> None:
    if not micro_batches or len(micro_batches) != len(weights):
        raise ValueError(f"an update needs one weight per micro-batch: {len(micro_batches)} and {len(weights)}")


def refuse_non_finite(metrics: dict[str, float], grad_norm: float, step: int) -> None:
    """Raise NonFiniteUpdate unless loss and gradient norm, both over all ranks, are finite."""
    if not (math.isfinite(metrics["loss"]) and math.isfinite(grad_norm)):
        raise NonFiniteUpdate(
            f"update {step}: loss {metrics['loss']} and gradient norm {grad_norm} must be finite; the weights are "
            "unchanged (a lower learning rate, a smaller max_grad_norm or float32 may help)"
        )


def refuse_destroyed(found: str | None, learning_rate: float) -> None:
    """Raise DestroyedState, on all ranks alike, where any has ``found`` something; a collective call."""
    said = process_group.first_said(found)
    if said is not None:
        raise DestroyedState(f"an update at learning rate {learning_rate:g} has destroyed {said}")
