"""Guidance distillation: one call of the student for the teacher's two (arXiv:2210.03142, stage 1).

Shapes: N samples, C H W latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowalign.algorithm import Call, Calls, LossOutput, Models, Needs
from flowalign.algorithms.parts.points import DensityConfig, LatentAlgorithm, noised
from flowalign.flow import forward, path
from flowalign.flow.randomness import seeded
from flowalign.types import Condition, Credit, Guidance, LatentBatch, Scores, TrainBatch


class GuidanceDistill(LatentAlgorithm):
    """Regress the student's plain velocity on the teacher's guided one, at noised latents."""

    class Config(DensityConfig):
        """Times are uniform and all errors of the velocity weigh alike; the paper's loss on x̂_0 has a weight of the
        SNR in its place.
        """

        type: str = "guidance_distill"
        guidance_scale: float = Field(3.0, ge=0)
        """Guidance of the teacher, which is built into the student: it is called without."""
        guidance_range: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] | None = None
        """Range of guidances, of which each sample draws its own and the student, whose network has the input
        ``guidance`` or takes a number by its class, is told; null: ``guidance_scale`` alone.
        """

        @model_validator(mode="after")
        def _range_is_one(self) -> GuidanceDistill.Config:
            if self.guidance_range is not None and self.guidance_range[0] >= self.guidance_range[1]:
                raise ValueError(
                    f"guidance_range: {list(self.guidance_range)} holds no range; give the lower end first, "
                    "or name one guidance_scale"
                )
            return self

    config: Config

    @property
    def needs(self) -> Needs:
        inputs = () if self.config.guidance_range is None else ("guidance",)
        return Needs(LatentBatch, teacher=True, inputs=inputs)

    @property
    def network_calls(self) -> Calls:
        c = self.config
        scale = c.guidance_scale if c.guidance_range is None else torch.tensor(c.guidance_range)  # one of each sample
        return Calls(loss=(Call("policy", learns=True), Call("teacher", guidance=Guidance(scale))))

    def card_facts(self) -> dict[str, str]:
        c = self.config
        if c.guidance_range is not None:
            low, high = c.guidance_range
            return {"Guidance": f"an input of the network, taught from {low:g} to {high:g}; costs no second evaluation"}
        return {"Guidance": f"{c.guidance_scale:g} is built in: sample with `guidance_scale=1`"}

    def credit(self, batch: LatentBatch, scores: Scores | None) -> Credit:
        """Draw times, noises, dropped conditions and guidances from the batch's own seed."""
        generator, x0 = seeded(batch.seed), batch.latents_NCHW
        t = self.config.times((len(x0),), generator)
        drawn = noised(batch, generator, self.config.condition_dropout)
        tensors = {"x": path.interpolate(x0, drawn.noise, t), "t": t}
        if self.config.guidance_range is not None:
            low, high = self.config.guidance_range
            tensors["guidance"] = low + (high - low) * torch.rand(len(x0), generator=generator)
        return drawn.credit(tensors)

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        item, condition = minibatch.tensors, minibatch.condition
        target = self._target(models, item, condition)
        guidance = Guidance(item["guidance"]) if "guidance" in item else None
        velocity = models["policy"](item["x"], item["t"], condition, guidance=guidance)
        loss = forward.velocity_error(velocity, target).mean()
        return LossOutput(loss, {"loss/velocity_mse": loss.detach()})

    @torch.no_grad()
    def _target(self, models: Models, item: Mapping[str, Tensor], condition: Condition) -> Tensor:
        """Return the guided teacher's velocity (N, C, H, W)."""
        guidance = Guidance(item.get("guidance", self.config.guidance_scale))
        return models["teacher"](item["x"], item["t"], condition, guidance=guidance)
