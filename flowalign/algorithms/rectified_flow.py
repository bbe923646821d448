"""Base training of every path family, rectified flow first (Esser et al. 2024, arXiv:2403.03206, sec. 2 and 3)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from flowalign.algorithm import Calls, LossOutput, Models, Needs
from flowalign.algorithms.parts.points import DensityConfig, LatentAlgorithm, noised
from flowalign.config.pathfamilies import PathFamilyName
from flowalign.config.walk import Shift
from flowalign.flow import path, pathfamilies
from flowalign.flow.density import Name as DensityName
from flowalign.flow.randomness import seeded
from flowalign.types import Credit, LatentBatch, Scores, TrainBatch


class RectifiedFlow(LatentAlgorithm):
    """Regress the conditional velocity at a random time of a family's path."""

    class Config(DensityConfig):
        """The error is that of the straight path's velocity, which every family's network is converted to."""

        type: str = "rectified_flow"
        family: PathFamilyName = "rf"
        """Path that is trained on."""
        density: DensityName = "logit_normal"
        """Density of the family's own time. ``logit_normal`` (0, 1) won in arXiv:2403.03206, table 1."""
        shift: Shift = 1.0
        """Shift of the times to noisier ones for larger images (arXiv:2403.03206, sec. 5.3.2; SD3: 3 at 1024²); null:
        that which the model is sampled with, ``auto``: the resolution's.
        """
        weighting: Literal["family", "velocity", "noise", "data"] = "family"
        """Whose error counts: ``family``, that of the raw output, the family's own loss (of the noise for eps, of F for
        edm), or that of the straight path's ``velocity``, of the ``noise`` or of the image, ``data``.
        """
        condition_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
        """Share of the samples with the empty text, for guidance."""
        guidance_scale: Annotated[float, Field(ge=0)] = 1.0
        """What a network is handed that takes its guidance as an input, such as FLUX.1 dev's; the loss guides nothing.
        diffusers' FLUX script: 3.5.
        """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.path_family = pathfamilies.path_family(config.family)

    config: Config

    @property
    def needs(self) -> Needs:
        return Needs(LatentBatch, path_family=self.config.family, guidance_scale=self.config.guidance_scale)

    @property
    def network_calls(self) -> Calls:
        return Calls()

    def check_schedule(self) -> None:
        self.schedule.shift_of(self.config.shift)

    def credit(self, batch: LatentBatch, scores: Scores | None) -> Credit:
        """Draw time, noise and dropped conditions from the batch's own seed; the time becomes the straight path's."""
        generator = seeded(batch.seed)
        own = self.config.times((len(batch.latents_NCHW),), generator, self._shift)
        drawn = noised(batch, generator, self.config.condition_dropout)
        t = own if self.config.family == "rf" else self.path_family.rf_time(own)
        return drawn.credit({"x0": drawn.latents, "noise": drawn.noise, "t": t, "weight": self._weight(own, t)})

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        x0, noise, t = (minibatch.tensors[k] for k in ("x0", "noise", "t"))
        velocity = models["policy"](path.interpolate(x0, noise, t), t, minibatch.condition)
        square = (velocity - path.velocity_target(x0, noise)).square()
        plain = square.mean()
        weight = minibatch.tensors["weight"]
        loss = plain if self._unweighted else (square.flatten(1).mean(1) * weight).mean()
        return LossOutput(loss, {"loss/velocity_mse": plain.detach()})

    @property
    def _shift(self) -> float:
        own = self.schedule.shift_of(self.config.shift)
        return self.schedule.shift if own is None else own

    @property
    def _unweighted(self) -> bool:
        return self.config.weighting == "velocity" or (self.config.weighting == "family" and self.config.family == "rf")

    def _weight(self, own: Tensor, t: Tensor) -> Tensor:
        """Return the factor (N,) of the squared velocity error: noise and image err by 1 - t and t times as much."""
        if self._unweighted:
            return torch.ones_like(t)
        if self.config.weighting == "family":
            return self.path_family.velocity_weight(own).float()
        return ((1 - t) if self.config.weighting == "noise" else t).square()
