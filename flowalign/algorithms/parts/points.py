"""Points of the forward process that losses are taken at: times, noises, dropped conditions.

Shapes: N samples, T points of each, M points, C H W latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowalign.algorithm import Algorithm, AlgorithmConfig, Models, Scheduled
from flowalign.algorithms.parts.sampling import OdeConfig
from flowalign.flow import density, forward, path
from flowalign.flow.density import Name as DensityName
from flowalign.flow.randomness import Stream, seeded
from flowalign.types import Condition, Credit, LatentBatch, SamplingPlan, TrainBatch, Trajectories

DROPPED = "dropped"  # of an item: whether its condition is the empty text's


def check_density(kind: str, params: Mapping[str, float]) -> None:
    """Raise ValueError unless ``params`` are those of a density of ``flow.density``."""
    try:
        density.density(kind, **params)
    except (TypeError, ValueError) as error:
        raise ValueError(f"density_params: {error}") from error


class DensityConfig(AlgorithmConfig):
    """Options of the algorithms that learn from noised latents, one point of each."""

    density: DensityName = "uniform"
    """Density of the times, one of ``flowalign.flow.density``."""
    density_params: dict[str, float] = Field(default_factory=dict)
    """Its parameters: m and s of ``logit_normal``, s of ``mode``, a of ``u_shaped``."""
    condition_dropout: float = Field(0.0, ge=0, le=1)
    """Share of the samples with the empty text."""

    @model_validator(mode="after")
    def _density_is_one(self) -> Self:
        check_density(self.density, self.density_params)
        return self

    def times(self, shape: Sequence[int], generator: torch.Generator, shift: float = 1.0) -> Tensor:
        """Draw times of ``shape``, float32 in (0, 1), on the CPU; ``shift`` above 1 moves them to noisier ones."""
        return density.sample(self.density, shape, generator, shift=shift, **self.density_params)


@dataclass(frozen=True)
class Noised:
    """N clean latents and what was drawn for them: noises (N, C, H, W) beside them, and whose condition is dropped.

    ``dropped`` (N,) is on the CPU.
    """

    latents: Tensor
    noise: Tensor
    dropped: Tensor
    condition: Condition

    def credit(self, tensors: Mapping[str, Tensor]) -> Credit:
        """Make items of all samples: ``tensors`` (N, ...) go where the latents are."""
        count = len(self.latents)
        moved = {name: tensor.to(self.latents.device) for name, tensor in tensors.items()}
        return Credit(torch.arange(count), {**moved, DROPPED: self.dropped}, count)


class LatentAlgorithm(Algorithm):
    """Base of the algorithms that learn from latents on disk: their ``credit`` ends with `Noised.credit`."""

    def items(self, batch: LatentBatch, credit: Credit) -> TrainBatch:
        condition = batch.condition.take(credit.sample).dropped(credit.tensors[DROPPED])
        return TrainBatch(credit.tensors, condition)


def noised(batch: LatentBatch, generator: torch.Generator, dropout: float) -> Noised:
    """Draw a noise for each of N latents, then whose condition is dropped, a share ``dropout`` in the mean."""
    noise = draw_noise(batch, generator)
    return Noised(batch.latents_NCHW, noise, draw_dropped(batch, generator, dropout), batch.condition)


def draw_noise(batch: LatentBatch, generator: torch.Generator) -> Tensor:
    """Draw noise (N, C, H, W) from the generator's CPU; it lies where the latents are."""
    return torch.randn(batch.latents_NCHW.shape, generator=generator).to(batch.latents_NCHW.device)


def draw_dropped(batch: LatentBatch, generator: torch.Generator, dropout: float) -> Tensor:
    """Draw whose condition is dropped: bool (N,) on the CPU."""
    return torch.rand(batch.latents_NCHW.shape[0], generator=generator) < dropout


class ForwardConfig(OdeConfig):
    """Options of the algorithms that roll out along the ODE and learn on forward-noised final latents,
    ``x_t = (1 - t) x_0 + t noise``. The losses know no guidance.
    """

    timesteps: int = Field(9, ge=1)
    """Points at which an image is learned. NFT's code: 9 of 10 levels."""
    density: Literal["grid", DensityName] = "grid"
    """Density of their times: ``grid``, the rollout's own levels (the codes of NFT and AWM), or one of
    ``flowalign.flow.density``.
    """
    density_params: dict[str, float] = Field(default_factory=dict)
    """Its parameters: m and s of ``logit_normal``, s of ``mode``, a of ``u_shaped``."""

    @model_validator(mode="after")
    def _density_is_one(self) -> Self:
        if self.density != "grid":
            check_density(self.density, self.density_params)
        elif self.density_params:
            raise ValueError("density_params: the grid of the rollout takes none; name a density or leave them out")
        return self

    def points_of(
        self, learns: Tensor, worth: Mapping[str, Tensor], metrics: Mapping[str, float], images: int | None = None
    ) -> Credit:
        """Return the points of the samples where ``learns`` (N,) is True, sample after sample, as items.

        Each has its sample's part of ``worth`` (N, ...). A mean is taken over the points of so many ``images``, by
        default those that are learned from.
        """
        chosen, count = learns.nonzero().flatten(), self.timesteps
        sample = chosen.repeat_interleave(count)
        tensors = {name: values[sample] for name, values in worth.items()}
        total = (len(chosen) if images is None else images) * count
        return Credit(sample, {**tensors, "point": torch.arange(count).repeat(len(chosen))}, total, metrics)

    def points(self, batch: Trajectories, credit: Credit) -> dict[str, Tensor]:
        """Draw the points of ``credit``, whose ``sample`` and ``point`` are of any one shape (...).

        Returns ``x`` (..., C, H, W), ``t`` (...) and the velocity ``target`` (..., C, H, W). They are a function of
        (run seed, policy version, sample id) and the final latents: not of the batch, nor of the workers that made it.
        """
        sample = credit.sample.flatten()
        x0 = batch.final_NCHW[sample]

        def generator(n: int) -> torch.Generator:
            return seeded(batch.seed, Stream.POINTS, batch.policy_version, batch.batch.sample_ids[n])

        t, noise = drawn(
            self.density,
            self.timesteps,
            x0.shape[1:],
            generator,
            sample,
            credit.tensors["point"].flatten(),
            batch.plan.sigmas,
            **self.density_params,
        )
        points = {"x": path.interpolate(x0, noise, t), "t": t, "target": path.velocity_target(x0, noise)}
        return {name: tensor.unflatten(0, credit.sample.shape) for name, tensor in points.items()}


def drawn(
    kind: str,
    count: int,
    shape: Sequence[int],
    generator: Callable[[int], torch.Generator],
    sample: Tensor,
    point: Tensor,
    sigmas: Sequence[float],
    **params: float,
) -> tuple[Tensor, Tensor]:
    """Draw time (M,) and noise (M, *shape) number ``point`` of the ``count`` of each ``sample``, both (M,).

    ``generator`` makes that of a sample. The other arguments are those of `forward.draw`.
    """
    t, noise = torch.zeros(len(sample)), torch.zeros(len(sample), *shape)
    for one in sample.unique().tolist():
        own = (sample == one).nonzero().flatten()
        (times,), (noises,) = forward.draw(kind, count, shape, [generator(one)], sigmas, **params)
        t[own], noise[own] = times[point[own]], noises[point[own]]
    return t, noise


class ForwardAlgorithm(Scheduled):
    """Base of the algorithms whose options are those of `ForwardConfig`: ODE steps alone make their images."""

    def plan(self, iteration: int, seed: int) -> SamplingPlan:
        return self.config.sampling_plan(self.levels())

    def most_items(self, samples: int) -> int:
        return samples * self.config.timesteps

    def annotate(self, models: Models, batch: Trajectories, credit: Credit) -> Mapping[str, Tensor]:
        """Draw the points."""
        return self.config.points(batch, credit)
