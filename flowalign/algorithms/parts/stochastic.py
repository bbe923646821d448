"""Trajectories with noise in a window of their steps: how they are made, and which of these steps are learned from.

Shapes: N samples, S window steps, n of them trained, J granularities.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowalign.algorithms.parts.sampling import SamplingConfig
from flowalign.algorithms.parts.window import MovingWindow
from flowalign.flow.randomness import Stream, seeded
from flowalign.flow.schedule import PipelineSchedule
from flowalign.types import Branching, Noise, SamplingPlan, Trajectories


class StochasticConfig(SamplingConfig):
    """Options of walks of which a window's steps have noise.

    With a window of one step, ``initial_noise: group``, ``share_prefix`` and ``granularities`` of 1 and 2 this is G²RPO
    (arXiv:2510.01982; its code takes the first step after the noise alone, here all are taken at the granularity, but
    for a shorter last one).
    """

    kind: Literal["flow", "dance", "cps"] = "flow"
    """Noise of the SDE: that of Flow-GRPO (eq. 9), of DanceGRPO (arXiv:2505.07818), or of Flow-GRPO-Fast's code."""
    noise_level: float = Field(0.7, gt=0)
    """Strength of the noise, a or η. Flow-GRPO: 0.7."""
    initial_noise: Literal["own", "group"] = "own"
    """``own`` for each image (Flow-GRPO), or one for the ``group`` (DanceGRPO, MixGRPO): then the noisy steps alone,
    which get the credit, tell its images apart.
    """
    share_prefix: bool = False
    """Steps before the window once a group, with ``initial_noise: group`` (the branching of Flow-GRPO-Fast's code and
    of arXiv:2510.01982).
    """
    window: MovingWindow = MovingWindow()
    """The steps that have noise and are learned from. Flow-GRPO: all."""
    train_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps of the window that are learned from, drawn anew (DanceGRPO's code: 60 %); null: all."""
    train_steps_by: Literal["sample", "iteration"] = "sample"
    """Drawn for each ``sample`` (DanceGRPO's code), or for the whole ``iteration``."""
    granularities: tuple[Annotated[int, Field(ge=1)], ...] = Field((1,), min_length=1)
    """Numbers of ODE steps at a time; every image is finished once for each, and scored (G²RPO, arXiv:2510.01982: 1 and
    2).
    """
    log_prob: Literal["gaussian", "unnormalised"] = "gaussian"
    """``gaussian``, or ``unnormalised``: −mean (x' − mean)², as in the public ``cps`` code."""

    @model_validator(mode="after")
    def _walk_is_one(self) -> Self:
        begin, end = self.plan(PipelineSchedule().levels(self.num_steps, self.shift, self.grid), 0, 0).noise.window
        if self.train_steps is not None and self.train_steps > end - begin:
            raise ValueError(f"train_steps: is {self.train_steps}, but the window has {end - begin} steps")
        if self.train_steps is None and self.train_steps_by != "sample":
            raise ValueError("train_steps_by: without train_steps all steps of the window are trained")
        if self.share_prefix and self.initial_noise != "group":
            raise ValueError("share_prefix: set initial_noise: group, or the steps before the window are not the same")
        if self.share_prefix and self.window.start == 0 and self.window.kind in ("full", "fixed"):
            raise ValueError("share_prefix: the window begins at step 0, so that no step comes before it")
        self._check_granularities()
        return self

    def _check_granularities(self) -> None:
        window, ordered = self.window, sorted(self.granularities)
        if len(set(ordered)) < len(ordered):
            raise ValueError(f"granularities: {list(self.granularities)} would score an image twice")
        end = window.start + (window.size or 0) if window.kind == "fixed" else window.stop or self.num_steps
        left = self.num_steps - end
        if len(ordered) > 1 and left <= ordered[-2]:
            raise ValueError(
                f"granularities: {left} steps are left when the window ends at {end}, and {ordered[-2]} or "
                f"{ordered[-1]} of them at a time are the same; end it earlier"
            )

    def plan(self, sigmas: Tensor, iteration: int, seed: int) -> SamplingPlan:
        """Plan the walks of an iteration along ``sigmas`` (K + 1,); a moving window is a function of (seed, iteration).

        Raises ValueError as `MovingWindow.steps` does.
        """
        window = self.window.steps(self.kind, sigmas, self.noise_level, seed=seed, iteration=iteration)
        noise = Noise(self.kind, self.noise_level, window, self.log_prob)
        branching = Branching(self.initial_noise == "group", self.share_prefix, self.granularities)
        return replace(self.sampling_plan(sigmas, noise), branching=branching)

    def trained_steps(self, batch: Trajectories) -> Tensor:
        """Draw the steps of the window that each sample learns from: (N, n), ascending.

        They are a function of seed and sample id, or of seed and policy version where all samples have the same.
        """
        count, steps = batch.log_prob_NS.shape
        if self.train_steps is None:
            return torch.arange(steps).expand(count, steps)
        if self.train_steps_by == "iteration":
            generators = [seeded(batch.seed, Stream.STEPS_OF_AN_ITERATION, batch.policy_version)]
        else:
            ids = batch.batch.sample_ids[:: len(batch.plan.branching.granularities)]
            generators = [seeded(batch.seed, Stream.STEPS_OF_A_SAMPLE, sample_id) for sample_id in ids]
        drawn = [torch.randperm(steps, generator=generator)[: self.train_steps] for generator in generators]
        return torch.stack(drawn).sort(1).values.expand(count, self.train_steps)
