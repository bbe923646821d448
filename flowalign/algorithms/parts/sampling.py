"""Options of an iteration's samples: the walk, its guidance, and whose weights take it."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import AfterValidator, Field
from torch import Tensor

from flowalign.algorithm import AlgorithmConfig, Needs
from flowalign.config.fields import Takes
from flowalign.config.guidance import GuidanceKeys
from flowalign.config.sections import Weights
from flowalign.config.solvers import names_of_ode, spelled
from flowalign.config.walk import Grid, Shift
from flowalign.flow.guidance import guidance_of
from flowalign.flow.solvers import check_solver, ode_solver
from flowalign.types import Noise, SamplingPlan, Trajectories


def _ode(text: str) -> str:
    ode_solver(name := spelled(text, names_of_ode()))  # refuses those that make noise, which `check_solver` lets pass
    check_solver(name)
    return name


OdeSolverName = Annotated[str, AfterValidator(_ode), Takes(f"{', '.join(f'`{name}`' for name in names_of_ode())}")]


class WalkConfig(AlgorithmConfig):
    """Options of a walk's levels."""

    num_steps: int = Field(10, ge=1)
    """Steps of a walk."""
    shift: Shift = None
    """Shift of the levels to noisier ones, as a static one; null: the model's own, ``auto``: the resolution's."""
    grid: Grid = "pipeline"
    """``pipeline``: the levels that the model's own pipeline walks. ``paper``: equal steps, shifted once."""


class SamplingConfig(GuidanceKeys, WalkConfig):
    """Options of the algorithms that roll out."""

    group_size: int = Field(24, ge=2)
    """Images of one prompt, among which advantages are formed. The codes of NFT and AWM: 24."""
    norm_preserving: bool = False
    """Guided velocity rescaled to the norm of the conditional one."""
    rollout_weights: Weights = "model"
    """Weights that make the images; ``ema``: the average with ``learner.ema_decay``, which is constant and applied at
    every update.
    """

    @property
    def rollout_needs(self) -> Needs:
        """Return the demands of every algorithm that learns from its own rollouts.

        `dataclasses.replace` adds the rest.
        """
        return Needs(
            Trajectories,
            group_size=self.group_size,
            rollout_weights=self.rollout_weights,
            guidance_scale=self.guidance_scale,
        )

    def sampling_plan(self, sigmas: Tensor, noise: Noise | None = None) -> SamplingPlan:
        """Plan a walk along ``sigmas`` (K + 1,) by ODE steps, and by those that ``noise`` says.

        By default all are ODE steps: no state is kept, no log-prob exists.
        """
        return SamplingPlan(tuple(sigmas.tolist()), noise or Noise(), guidance_of(self))


class OdeConfig(SamplingConfig):
    """Options of the algorithms whose images are made by ODE steps alone, and learned from as if they were data."""

    solver: OdeSolverName = "euler"
    """ODE solver that makes the images, a file of ``flow/solvers`` with its options in parentheses where it has some.
    What a solver gets wrong is learned, and made again in the next iteration by what was learned. ``ab2`` is of second
    order at the price of ``euler``. NFT's code: of second order.
    """

    def sampling_plan(self, sigmas: Tensor, noise: Noise | None = None) -> SamplingPlan:
        return replace(super().sampling_plan(sigmas, noise), solver=self.solver)
