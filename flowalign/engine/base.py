"""The contract of an engine: gradients, their reduction over ranks, clipping, the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from flowalign.algorithm import LossOutput
from flowalign.config.updates import OptimizerConfig
from flowalign.engine.offload import Offload
from flowalign.engine.shards import Layout
from flowalign.types import TrainBatch

LossFn = Callable[[TrainBatch], LossOutput]


class NonFiniteUpdate(RuntimeError):
    """Loss or gradient norm was NaN or Inf; the weights are as they were before the update."""


class ResumeRefused(ValueError):
    """A checkpoint's optimizer state does not fit this engine."""


@dataclass(frozen=True)
class EngineSettings:
    """Optimizer and engine of one run.

    ``dtype`` is the dtype of computation: trainable parameters, gradients and optimizer state are
    always float32, and bfloat16 means torch autocast around the loss. ``compile`` runs torch.compile on the network.
    ``schedule`` gives the learning rate of an update, counted from 0, where it is not the optimizer's own. ``offload``
    says where moments and, with an engine whose ranks hold them whole, frozen blocks are kept; None: on the device.
    """

    type: Literal["deepspeed", "fsdp", "torch"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    schedule: Callable[[int], float] | None = None
    offload: Offload | None = None

    @property
    def max_grad_norm(self) -> float:
        return self.optimizer.max_grad_norm

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of update ``step``, counted from 0."""
        return (self.schedule or self.optimizer.learning_rate_at)(step)


class Engine(Protocol):
    """Owns the optimizer of one policy network on one rank.

    ``step`` accumulates the gradient of ``sum_over_all_ranks(weight_i * loss_i)``, where
    ``weight_i = len(micro_batch_i) / total``, clips it and applies it once. Every rank passes the same
    number of micro-batches (an empty share is padded by the learner with weight 0).
    """

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def steps(self) -> int:
        """Updates made so far, those before a resume included."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the precision in which ``step`` computes its loss, for forward passes made outside of it."""
        ...

    def step(self, loss_fn: LossFn, micro_batches: Sequence[TrainBatch], weights: Sequence[float]) -> dict[str, float]:
        """Make one optimizer update.

        Returns loss, grad_norm, learning_rate and the weighted metrics, each summed over micro-batches
        and ranks. A metric that is a `Max` is their maximum instead, micro-batches of weight 0 left out.

        Raises:
            NonFiniteUpdate: before the weights were touched.
            DestroyedState: weights or moments are destroyed; every rank says the same.
        """
        ...

    def weights(self) -> dict[str, Tensor]:
        """Return the full (gathered) trainable parameters by name, float32 on the CPU; a collective call."""
        ...

    @property
    def layout(self) -> Layout:
        """Where the values of the trainable parameters lie in the tensors ``held``."""
        ...

    def held(self) -> dict[str, Tensor]:
        """Return the float32 tensors themselves that the optimizer of this rank steps: parameters, or its shards."""
        ...

    def publish(self) -> None:
        """Let the network have what was written into the tensors ``held``; a collective call."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return the JSON-able facts of the state: engine, ranks, ZeRO stage, updates, what this rank holds."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """Return the optimizer's moments themselves, by ``KIND/NAME`` with the names of ``held``.

        There are none before the first update.
        """
        ...

    def optimizer_state(self) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        """Return copies of this rank's optimizer tensors, and its ``facts``."""
        ...

    def load_optimizer_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Restore this rank's own state bit for bit, or its share of a state that is whole (`convert.whole`).

        Raises:
            ResumeRefused: it is of other parameters, or another rank's share.
        """
        ...

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the trainable parameters (and their master copies) before training goes on."""
        ...

    def close(self) -> None: ...
