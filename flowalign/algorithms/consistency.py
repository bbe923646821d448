"""Latent consistency distillation (arXiv:2310.04378, arXiv:2303.01469): one state of a line leads where the next does.

Shapes: N samples, K steps, C H W latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowalign.algorithm import Call, Calls, LossOutput, Models, Needs, Scheduled
from flowalign.algorithms.parts.points import LatentAlgorithm, noised
from flowalign.algorithms.parts.sampling import WalkConfig
from flowalign.config.walk import Grid
from flowalign.flow import path
from flowalign.flow.losses import pseudo_huber
from flowalign.flow.path import per_sample
from flowalign.flow.randomness import seeded
from flowalign.types import Condition, Credit, Guidance, LatentBatch, Scores, TrainBatch


class Consistency(LatentAlgorithm, Scheduled):
    """``f(x, t) = x - t v(x, t)`` at a time is pulled to the average's ``f`` at an earlier one, further down the line.

    ``f(x, 0) = x`` holds whatever the network says, so no skip coefficients are needed.
    """

    class Config(WalkConfig):
        """Options of consistency distillation (arXiv:2310.04378), and of consistency training (arXiv:2303.01469,
        algorithm 3).
        """

        type: str = "consistency"
        teacher: Literal["model", "none"] = "model"
        """``model``: a step of the guided teacher's ODE, whose student is called without guidance. ``none``: the
        straight line of the data and its own noise, which needs no teacher and knows no guidance.
        """
        solver: Literal["euler", "heun"] = "euler"
        """Solver of the teacher's step."""
        guidance_scale: float = Field(1.0, ge=0)
        """Guidance of the teacher."""
        num_steps: int = Field(1000, ge=1)
        """Steps of the grid of times. arXiv:2310.04378: 1000."""
        skip: int = Field(20, ge=1)
        """Steps of the grid that are taken at once, fewer at its end. arXiv:2310.04378: 20."""
        grid: Grid = "paper"
        """``pipeline``: the levels that the model's own pipeline walks. ``paper``: equal steps, shifted once."""
        loss: Literal["squared", "pseudo_huber"] = "pseudo_huber"
        """Loss of the distance; ``pseudo_huber``: that of arXiv:2310.14189."""
        c: float | None = Field(None, gt=0)
        """Constant of ``pseudo_huber``; null: ``0.00054 sqrt(d)``."""
        condition_dropout: float = Field(0.0, ge=0, le=1)
        """Share of the samples with the empty text."""

        @model_validator(mode="after")
        def _together(self) -> Consistency.Config:
            if self.skip > self.num_steps:
                raise ValueError(f"skip: {self.skip} steps exceed the grid's num_steps of {self.num_steps}")
            if self.teacher == "none" and (self.guidance_scale != 1 or self.solver != "euler"):
                raise ValueError("teacher: none has neither guidance_scale nor solver; leave both out")
            if self.loss == "squared" and self.c is not None:
                raise ValueError("c: the squared loss has none; choose pseudo_huber or leave it out")
            return self

    config: Config

    @property
    def needs(self) -> Needs:
        return Needs(LatentBatch, teacher=self.config.teacher == "model", average=True)

    @property
    def network_calls(self) -> Calls:
        c = self.config
        teacher = Call("teacher", {"euler": 1, "heun": 2}[c.solver], Guidance(c.guidance_scale))
        return Calls(loss=(Call("policy", learns=True), Call("ema"), *(teacher,) * (c.teacher == "model")))

    def credit(self, batch: LatentBatch, scores: Scores | None) -> Credit:
        """Draw a step of the grid, noise and dropped conditions from the batch's own seed."""
        c, generator, sigmas = self.config, seeded(batch.seed), self.levels()
        step = torch.randint(c.num_steps, (len(batch.latents_NCHW),), generator=generator)
        drawn = noised(batch, generator, c.condition_dropout)
        times = {"t": sigmas[step], "s": sigmas[(step + c.skip).clamp_max(c.num_steps)]}
        return drawn.credit({"x0": drawn.latents, "noise": drawn.noise, **times})

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        item, condition = minibatch.tensors, minibatch.condition
        x = path.interpolate(item["x0"], item["noise"], item["t"])
        with torch.no_grad():
            earlier = self._step(models, x, item, condition)
            velocity = models["ema"](earlier, item["s"], condition)
            target = path.x0_from_velocity(earlier, velocity, item["s"])
        velocity = models["policy"](x, item["t"], condition)
        difference = path.x0_from_velocity(x, velocity, item["t"]) - target
        squared = difference.square().mean()
        loss = squared if self.config.loss == "squared" else pseudo_huber(difference, self.config.c).mean()
        return LossOutput(loss, {"loss/consistency": loss.detach(), "loss/consistency_mse": squared.detach()})

    def _step(self, models: Models, x: Tensor, item: Mapping[str, Tensor], condition: Condition) -> Tensor:
        """Return the state at ``s`` of the line through ``x`` at ``t``."""
        c, t, s = self.config, item["t"], item["s"]
        if c.teacher == "none":
            return path.interpolate(item["x0"], item["noise"], s)
        guidance = Guidance(c.guidance_scale)
        slope = models["teacher"](x, t, condition, guidance=guidance)
        delta = per_sample(s - t, x)
        if c.solver == "heun":
            ahead = models["teacher"](x + delta * slope, s, condition, guidance=guidance)
            # A step that ends at t = 0 is Euler, as in `flow.solvers`.
            slope = torch.where(per_sample(s, x) > 0, (slope + ahead) / 2, slope)
        return x + delta * slope
