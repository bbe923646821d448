"""The contract of an algorithm: what it consumes, how trajectories are made, how credit becomes a loss.

An algorithm is one file under ``flowalign/algorithms`` (or any dotted path). Loop and learner
branch on the declarations below and never on an algorithm's name.
"""

from __future__ import annotations

import functools
import hashlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from flowalign.config.booleans import refuse_boolean
from flowalign.config.largest import check_largest
from flowalign.config.walk import Grid, Shift
from flowalign.flow import density, forward, path, sde
from flowalign.flow.schedule import PipelineSchedule
from flowalign.types import Condition, Rollout, RolloutSpec, Scores, TrainBatch
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


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator that is a function of a few integers (run seed, iteration, sample id …)."""
    digest = hashlib.sha256(",".join(str(int(n)) for n in numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def check_density(kind: str, params: Mapping[str, float]) -> None:
    """Raise ValueError unless ``params`` are those of a density of ``flow.density``."""
    try:
        density.density(kind, **params)
    except (TypeError, ValueError) as error:
        raise ValueError(f"density_params: {error}") from error


class DensityConfig(AlgorithmConfig):
    """Options of the algorithms that learn from noised latents, one point of each: the density of its time, and the
    share of the conditions that are dropped."""

    density: Literal["uniform", "logit_normal", "mode", "cosmap", "u_shaped"] = "uniform"
    density_params: dict[str, float] = Field(default_factory=dict)
    condition_dropout: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _density_is_one(self) -> Self:
        check_density(self.density, self.density_params)
        return self

    def times(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Times of ``shape``, float32 in (0, 1), on the CPU."""
        return density.sample(self.density, shape, generator, **self.density_params)


class ForwardConfig(AlgorithmConfig):
    """Options of the algorithms that roll out along the ODE and learn on forward-noised final latents.

    Of every image they take ``timesteps`` points ``x_t = (1 - t) x_0 + t noise``. With ``density: grid`` t comes from
    the rollout's own noise levels, as in the public code of NFT and AWM; else from a density of ``flow.density`` with
    ``density_params``. ``guidance_scale`` is the rollout's: the losses know no guidance. ``shift`` null is the model's
    own, ``auto`` the resolution's. With ``rollout_weights: ema`` the learner's average makes the images, and
    ``ema_decay`` is the learner's: constant, and applied at every optimizer step.
    """

    group_size: int = Field(24, ge=2)
    num_steps: int = Field(10, ge=1)
    shift: Shift = None
    grid: Grid = "pipeline"
    guidance_scale: float = Field(1.0, ge=0)
    norm_preserving: bool = False
    timesteps: int = Field(9, ge=1)
    density: Literal["grid", "uniform", "logit_normal", "mode", "cosmap", "u_shaped"] = "grid"
    density_params: dict[str, float] = Field(default_factory=dict)
    rollout_weights: Literal["policy", "ema"] = "policy"

    @model_validator(mode="after")
    def _density_is_one(self) -> Self:
        if self.density == "grid":
            if self.density_params:
                raise ValueError("density_params: the grid of the rollout takes none; name a density or leave them out")
            return self
        check_density(self.density, self.density_params)
        return self

    def rollout_spec(self, sigmas: Tensor) -> RolloutSpec:
        """Every step an ODE step along ``sigmas``: no state is kept, no log-prob exists."""
        return RolloutSpec(
            kind="ode",
            sigmas=tuple(sigmas.tolist()),
            window=(0, 0),
            noise_level=0.0,
            guidance_scale=self.guidance_scale,
            norm_preserving=self.norm_preserving,
        )

    def points(self, batch: Rollout, learns: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The points of the samples where ``learns`` (N,) is True, M in all, sample after sample.

        Returns the sample of each (M,), and ``x`` (M, C, H, W), ``t`` (M,) and the velocity ``target`` (M, C, H, W).
        They are a function of (run seed, policy version, sample id) and the final latents: not of the batch, nor of
        the workers that made it.
        """
        chosen = learns.nonzero().flatten()
        ids = [batch.batch.sample_ids[n] for n in chosen.tolist()]
        t_NT, noise_NTCHW = forward.draw(
            self.density,
            self.timesteps,
            batch.final_NCHW.shape[1:],
            [seeded(batch.seed, 13, batch.policy_version, sample_id) for sample_id in ids],
            batch.spec.sigmas,
            **self.density_params,
        )
        sample = chosen.repeat_interleave(self.timesteps)
        x0, noise, t = batch.final_NCHW[sample], noise_NTCHW.flatten(0, 1), t_NT.flatten()
        return sample, {"x": path.interpolate(x0, noise, t), "t": t, "target": path.velocity_target(x0, noise)}


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
        options = {k: v[index] if isinstance(v, Tensor) and v.ndim else v for k, v in options.items()}
        return model(x[index], t[index], condition.take(index), **options)[:count]

    return call
