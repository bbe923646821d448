"""The contract of an algorithm: what it consumes, how trajectories are made, how credit becomes a loss.

An algorithm is one file under ``flowalign/algorithms`` (or any dotted path). Loop and learner
branch on the declarations below and never on an algorithm's name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from flowalign.flow import sde
from flowalign.types import Condition, RolloutSpec, Scores, TrainBatch


class VelocityModel(Protocol):
    """A network as a function: ``velocity(x_t, t, condition)`` with x (N, C, H, W) and t (N,) in [0, 1]."""

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        r: Tensor | None = None,
        guidance: float | None = None,
        norm_preserving: bool = False,
    ) -> Tensor: ...


Models = Mapping[str, VelocityModel]


@dataclass(frozen=True)
class LossOutput:
    """A scalar loss, the mean over a minibatch's items, and detached metrics (each a mean as well)."""

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class AlgorithmConfig(BaseModel):
    """Base of the nested ``Config`` of every algorithm; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: str


class Algorithm(Protocol):
    """See design: ``prepare`` runs once per batch without gradients, ``loss`` once per micro-batch."""

    Config: ClassVar[type[AlgorithmConfig]]
    config: Any

    @property
    def consumes(self) -> type:
        """``Rollout``, ``PreferencePairs`` or ``LatentBatch``."""
        ...

    @property
    def models(self) -> tuple[str, ...]:
        """Roles of the networks it needs: ``policy``, ``reference``, ``teacher:<name>``."""
        ...

    @property
    def needs_scores(self) -> bool: ...

    @property
    def rollout_weights(self) -> Literal["policy", "ema"]: ...

    def rollout_plan(self, iteration: int, seed: int) -> RolloutSpec | None:
        """How iteration ``iteration`` of a run with ``seed`` makes its trajectories; None: it makes none."""
        ...

    def prepare(self, batch: Any, scores: Scores | None, models: Models) -> TrainBatch: ...

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput: ...


class UnknownAlgorithm(ValueError):
    """``algorithm.type`` names nothing that can be imported."""


def known_algorithms() -> list[str]:
    """Names of the algorithms that ship with the package."""
    import flowalign

    path = [f"{p}/algorithms" for p in flowalign.__path__]
    return sorted(module.name for module in pkgutil.iter_modules(path))


def algorithm_class(name: str) -> type[Any]:
    """The class behind ``algorithm.type``: a file under ``flowalign/algorithms`` or ``package.module[:Class]``.

    Raises:
        UnknownAlgorithm: nothing of that name can be imported, or it holds no algorithm.
    """
    module_name, _, attribute = name.partition(":")
    if "." not in module_name:
        if module_name not in known_algorithms():
            raise UnknownAlgorithm(f"algorithm.type: no algorithm {name!r}; known: {', '.join(known_algorithms())}")
        module_name = f"flowalign.algorithms.{module_name}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UnknownAlgorithm(f"algorithm.type: cannot import {module_name!r}: {error}") from error
    if attribute:
        found = getattr(module, attribute, None)
    else:
        own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
        found = next((v for v in own if hasattr(v, "Config") and hasattr(v, "loss")), None)
    if found is None:
        raise UnknownAlgorithm(f"algorithm.type: {module_name} holds no class with a Config and a loss")
    return found


def build_algorithm(config: AlgorithmConfig | Mapping[str, Any]) -> Any:
    """An algorithm from its config (or the plain mapping of one)."""
    name = config.type if isinstance(config, AlgorithmConfig) else str(config["type"])
    cls = algorithm_class(name)
    parsed = config if isinstance(config, AlgorithmConfig) else cls.Config.model_validate(dict(config))
    return cls(parsed)


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator that is a function of a few integers (run seed, iteration, sample id …)."""
    import hashlib

    digest = hashlib.sha256(",".join(str(int(n)) for n in numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def step_log_prob(spec: RolloutSpec, x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The log-prob of a step in the spec's form, a mean over dimensions: (N,)."""
    if spec.log_prob == "unnormalised":
        return sde.log_prob_mean_unnormalised(x_next, mean)
    return sde.log_prob_mean(x_next, mean, std)


def fixed_geometry(model: VelocityModel, size: int) -> VelocityModel:
    """``model``, called with exactly ``size`` samples: a smaller batch is padded with copies of its first.

    Kernels choose their order of summation by the batch size, so a short last micro-batch would
    replay the rollout's log-probs only up to rounding.
    """

    def call(x: Tensor, t: Tensor, condition: Condition, **options: Any) -> Tensor:
        count = x.shape[0]
        if count >= size:
            return model(x, t, condition, **options)
        index = torch.cat([torch.arange(count), torch.zeros(size - count, dtype=torch.long)]).to(x.device)
        return model(x[index], t[index], condition.take(index), **options)[:count]

    return call
