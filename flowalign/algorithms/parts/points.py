"""Points of the forward process that losses are taken at: times, noises, dropped conditions.

Shapes: N samples, T points of each, M points, C H W latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowalign.algorithm import AlgorithmConfig, Scheduled
from flowalign.algorithms.parts.sampling import SamplingConfig
from flowalign.flow import density, forward, path
from flowalign.flow.density import Name as DensityName
from flowalign.flow.randomness import Stream, seeded
from flowalign.types import Condition, LatentBatch, SamplingPlan, TrainBatch, Trajectories, dropped_conditions


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

    def batch(self, tensors: Mapping[str, Tensor]) -> TrainBatch:
        """Make items of all samples: ``tensors`` (N, ...) go where the latents are."""
        moved = {name: tensor.to(self.latents.device) for name, tensor in tensors.items()}
        return TrainBatch(moved, dropped_conditions(self.condition, self.dropped), total=len(self.latents))


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


class ForwardConfig(SamplingConfig):
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

    def points(self, batch: Trajectories, learns: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw the points of the samples where ``learns`` (N,) is True, M in all, sample after sample.

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
            [seeded(batch.seed, Stream.POINTS, batch.policy_version, sample_id) for sample_id in ids],
            batch.plan.sigmas,
            **self.density_params,
        )
        sample = chosen.repeat_interleave(self.timesteps)
        x0, noise, t = batch.final_NCHW[sample], noise_NTCHW.flatten(0, 1), t_NT.flatten()
        return sample, {"x": path.interpolate(x0, noise, t), "t": t, "target": path.velocity_target(x0, noise)}


class ForwardAlgorithm(Scheduled):
    """Base of the algorithms whose options are those of `ForwardConfig`: ODE steps alone make their images."""

    def plan(self, iteration: int, seed: int) -> SamplingPlan:
        return self.config.sampling_plan(self.levels())
