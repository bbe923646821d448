"""Options of an iteration's samples: the walk, its guidance, and whose weights take it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from flowalign.algorithm import AlgorithmConfig, Needs
from flowalign.config.walk import Grid, Shift
from flowalign.types import Guidance, Noise, Rollout, SamplingPlan


class WalkConfig(AlgorithmConfig):
    """Options of a walk's levels. ``shift`` null is the model's own, ``auto`` the resolution's."""

    num_steps: int = Field(10, ge=1)
    shift: Shift = None
    grid: Grid = "pipeline"


class SamplingConfig(WalkConfig):
    """Options of the algorithms that roll out: ``group_size`` images of each prompt.

    With ``rollout_weights: ema`` the learner's average makes the images, and ``ema_decay`` is the learner's: constant,
    and applied at every optimizer step.
    """

    group_size: int = Field(24, ge=2)
    guidance_scale: float = Field(1.0, ge=0)
    norm_preserving: bool = False
    rollout_weights: Literal["policy", "ema"] = "policy"

    @property
    def rollout_needs(self) -> Needs:
        """Return the demands of every algorithm that learns from its own rollouts.

        `dataclasses.replace` adds the rest.
        """
        return Needs(Rollout, group_size=self.group_size, rollout_weights=self.rollout_weights)

    def sampling_plan(self, sigmas: Tensor, noise: Noise | None = None) -> SamplingPlan:
        """Plan a walk along ``sigmas`` (K + 1,) by ODE steps, and by those that ``noise`` says.

        By default all are ODE steps: no state is kept, no log-prob exists.
        """
        guidance = Guidance(self.guidance_scale, self.norm_preserving)
        return SamplingPlan(tuple(sigmas.tolist()), noise or Noise(), guidance)
