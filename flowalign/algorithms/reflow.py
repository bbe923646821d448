"""Reflow: straighten a flow on fixed pairs of noise and what the flow made of it.

Rectified flow (arXiv:2209.03003, sec. 2.2) with the losses of "Improving the Training of Rectified Flows"
(arXiv:2405.20320). Shapes: N samples, C H W latents.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowalign.algorithm import Calls, Features, LossOutput, Models, Needs
from flowalign.algorithms.parts.points import DensityConfig, LatentAlgorithm, Noised, draw_dropped, draw_noise
from flowalign.flow import forward, path
from flowalign.flow.density import Name as DensityName
from flowalign.flow.losses import feature_distance, pseudo_huber
from flowalign.flow.randomness import seeded
from flowalign.types import Credit, LatentBatch, Scores, TrainBatch


class Reflow(LatentAlgorithm):
    """Regress ``noise - x0`` on the straight line of a coupled pair; 0 is reached where no two lines cross."""

    class Config(DensityConfig):
        """A batch without noise is all real data, as in a plain flow; a run mixes both (``real_data``)."""

        type: str = "reflow"
        density: DensityName = "u_shaped"
        """Density of the times. The paper: ``u_shaped`` (a = 4), since the middle of a line between a pair is easy."""
        loss: Literal["squared", "pseudo_huber", "lpips_huber", "lpips_huber_over_t"] = "pseudo_huber"
        """The squared error, a mean over dimensions, the pseudo-Huber, or ``(1 - t) huber / d + LPIPS`` of the
        predicted clean latent, and with ``_over_t`` ``(1 - t) huber / d + LPIPS / t``, where huber is a mean over the d
        dimensions as in the paper's code.
        """
        c: float | None = Field(None, gt=0)
        """Constant of the pseudo-Huber; null: ``0.00054 sqrt(d)``. The paper's code: ``0.00054 d``."""

        @model_validator(mode="after")
        def _c_has_a_use(self) -> Reflow.Config:
            if self.loss == "squared" and self.c is not None:
                raise ValueError("c: the squared loss has none; choose another loss or leave it out")
            return self

    config: Config

    @property
    def needs(self) -> Needs:
        return Needs(LatentBatch, features=self.config.loss.startswith("lpips"))

    @property
    def network_calls(self) -> Calls:
        return Calls()

    def credit(self, batch: LatentBatch, scores: Scores | None) -> Credit:
        """Draw times, dropped conditions and noise that is missing from the batch's own seed."""
        generator, x0 = seeded(batch.seed), batch.latents_NCHW
        t = self.config.times((len(x0),), generator)
        dropped = draw_dropped(batch, generator, self.config.condition_dropout)
        noise = draw_noise(batch, generator) if batch.noise_NCHW is None else batch.noise_NCHW
        return Noised(x0, noise, dropped, batch.condition).credit({"x0": x0, "noise": noise, "t": t})

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        x0, noise, t = (minibatch.tensors[k] for k in ("x0", "noise", "t"))
        x = path.interpolate(x0, noise, t)
        velocity = models["policy"](x, t, minibatch.condition)
        target = path.velocity_target(x0, noise)
        error = forward.velocity_error(velocity, target)
        metrics = {"loss/velocity_mse": error.detach().mean()}
        if self.config.loss == "squared":
            return LossOutput(error.mean(), metrics)
        huber = pseudo_huber(velocity - target, self.config.c)
        metrics["loss/huber"] = huber.detach().mean()
        if self.config.loss == "pseudo_huber":
            return LossOutput(huber.mean(), metrics)
        features = cast(Features, models["features"])
        perceptual = self._perceptual(features, path.x0_from_velocity(x, velocity, t), x0)
        metrics["loss/lpips"] = perceptual.detach().mean()
        if self.config.loss == "lpips_huber_over_t":
            perceptual = perceptual / t
        return LossOutput(((1 - t) * huber / x0[0].numel() + perceptual).mean(), metrics)

    def _perceptual(self, features: Features, predicted: Tensor, x0: Tensor) -> Tensor:
        with torch.no_grad():
            target = features(x0)
        return feature_distance(features(predicted), target)
