"""The contract of an algorithm: what it consumes, how trajectories are made, how credit becomes a loss.

An algorithm is one file under ``flowalign/algorithms`` (or any dotted path). Loop and learner
branch on the declarations below and never on an algorithm's name.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, field_validator
from torch import Tensor

from flowalign.config.booleans import refuse_boolean
from flowalign.config.largest import check_largest
from flowalign.config.walk import Grid
from flowalign.flow.schedule import PipelineSchedule
from flowalign.types import Condition, RolloutSpec, Scores, TrainBatch
from rewards.usercode.loading import load_file, load_module, user_line


class VelocityModel(Protocol):
    """A network as a function: ``velocity(x_t, t, condition)`` with x (N, C, H, W) and t (N,) in [0, 1]."""

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        r: Tensor | None = None,
        guidance: float | Tensor | None = None,
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
    _no_boolean = field_validator("*", mode="before")(refuse_boolean)
    _within_limits = field_validator("*")(check_largest)


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
        """Roles of the networks it needs: ``policy``, ``reference``, ``teacher:<name>``, ``rollout``.

        ``rollout`` is the network with the weights that made the batch, the policy's or their average as
        ``rollout_weights`` declares. It is there in ``prepare`` only, in the place of ``policy``.
        """
        ...

    @property
    def needs_scores(self) -> bool: ...

    @property
    def rollout_weights(self) -> Literal["policy", "ema"]: ...

    def rollout_plan(self, iteration: int, seed: int) -> RolloutSpec | None:
        """How iteration ``iteration`` of a run with ``seed`` makes its trajectories; None: it makes none."""
        ...

    def prepare(self, batch: Any, scores: Scores | None, models: Models) -> TrainBatch:
        """What is learned from one batch; the learner gives models that take CPU tensors of any number of samples."""
        ...

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput: ...


class UnknownAlgorithm(ValueError):
    """``algorithm.type`` names nothing that can be imported."""


def known_algorithms() -> list[str]:
    """Names of the algorithms that ship with the package."""
    import flowalign

    path = [f"{p}/algorithms" for p in flowalign.__path__]
    return sorted(module.name for module in pkgutil.iter_modules(path) if not module.ispkg)


def algorithm_class(name: str) -> type[Any]:
    """The class behind ``algorithm.type``: the name of a file under ``flowalign/algorithms``, ``package.module`` or
    ``path/to/file.py``, the last two with ``:Class`` where they hold several. The user's code is run.

    Raises:
        UnknownAlgorithm: nothing of that name can be imported, or it holds no algorithm.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name.endswith(".py") and "." not in module_name:
        if module_name not in known_algorithms():
            raise UnknownAlgorithm(f"algorithm.type: no algorithm {name!r}; known: {', '.join(known_algorithms())}")
        module_name = f"flowalign.algorithms.{module_name}"
    is_file = module_name.endswith(".py")
    try:
        module = _of_file(str(Path(module_name).resolve())) if is_file else load_module(module_name)
    except Exception as error:
        line = user_line(error)
        kind = "" if isinstance(error, ImportError | OSError | SyntaxError) else f"{type(error).__name__}: "
        where = f" ({line})" if line and not isinstance(error, SyntaxError) else ""
        raise UnknownAlgorithm(f"algorithm.type: cannot import {module_name!r}: {kind}{error}{where}") from error
    if attribute:
        found = getattr(module, attribute, None)
    else:
        own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
        found = next((v for v in own if hasattr(v, "Config") and hasattr(v, "loss")), None)
    if found is None and attribute:
        near = get_close_matches(attribute, [name for name, v in vars(module).items() if isinstance(v, type)], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UnknownAlgorithm(f"algorithm.type: {module_name} has no {attribute!r}{hint}")
    if found is None:
        raise UnknownAlgorithm(f"algorithm.type: {module_name} holds no class with a Config and a loss")
    return found


@functools.cache
def _of_file(location: str) -> ModuleType:
    """The module of a file outside any package, imported once a process."""
    return load_file(Path(location))


class Scheduled:
    """What an algorithm inherits whose configuration has ``num_steps``, ``shift`` and ``grid``: its walk's levels."""

    config: Any
    schedule: PipelineSchedule = PipelineSchedule()  # the model's own, as `build_algorithm` is given it
    _made: tuple[PipelineSchedule, Tensor] | None = None

    def levels(self) -> Tensor:
        """Noise levels, float32 (num_steps + 1,); raises ValueError where the model's pipeline has none such."""
        if self._made is None or self._made[0] is not self.schedule:
            c = self.config
            grid: Grid = getattr(c, "grid", "pipeline")
            self._made = self.schedule, self.schedule.levels(c.num_steps, c.shift, grid)
        return self._made[1]

    def check_schedule(self) -> None:
        """Raise ValueError, its key first, where the algorithm has no levels on the model's own schedule."""
        self.levels()


def build_algorithm(config: AlgorithmConfig | Mapping[str, Any], schedule: PipelineSchedule | None = None) -> Any:
    """An algorithm from its config (or the plain mapping of one).

    ``schedule`` is how the model's own pipeline walks, which whoever asks for a plan or for times must give; by
    default a static scheduler of shift 1.
    """
    name = config.type if isinstance(config, AlgorithmConfig) else str(config["type"])
    cls = algorithm_class(name)
    parsed = config if isinstance(config, AlgorithmConfig) else cls.Config.model_validate(dict(config))
    algorithm = cls(parsed)
    if schedule is not None:
        algorithm.schedule = schedule
    return algorithm
