"""How the samples of an iteration are made: the walk, its guidance, and whose weights take it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from flowalign.algorithm import AlgorithmConfig, Needs
from flowalign.config.walk import Grid, Shift
from flowalign.types import Rollout, RolloutSpec, SdeKind


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
        """What every algorithm that learns from its own rollouts asks of a run; `dataclasses.replace` adds the rest."""
        return Needs(Rollout, group_size=self.group_size, rollout_weights=self.rollout_weights)

    def rollout_spec(
        self, sigmas: Tensor, kind: SdeKind = "ode", window: tuple[int, int] = (0, 0), noise_level: float = 0.0
    ) -> RolloutSpec:
        """Plan a walk along ``sigmas`` (K + 1,): ODE steps, but those in ``window``, which are of ``kind``.

        By default all are ODE steps: no state is kept, no log-prob exists.
        """
        return RolloutSpec(
            kind=kind,
            sigmas=tuple(sigmas.tolist()),
            window=window,
            noise_level=noise_level,
            guidance_scale=self.guidance_scale,
            norm_preserving=self.norm_preserving,
        )
