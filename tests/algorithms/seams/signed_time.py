"""A velocity asked at negative times (as TwinFlow does): at -t the network learns the way back."""

from __future__ import annotations

import torch

from flowalign.algorithm import LossOutput, Models, Needs
from flowalign.algorithms.parts.points import DensityConfig, LatentAlgorithm, noised
from flowalign.flow import forward, path
from flowalign.flow.randomness import seeded
from flowalign.types import Credit, LatentBatch, Scores, TrainBatch


class SignedTime(LatentAlgorithm):
    """Flow matching at t, and at -t on the line from the noise to the image, whose velocity has the other sign."""

    class Config(DensityConfig):
        type: str = "signed_time"

    config: Config

    @property
    def needs(self) -> Needs:
        return Needs(LatentBatch, signed_time=True)

    def credit(self, batch: LatentBatch, scores: Scores | None) -> Credit:
        generator = seeded(batch.seed)
        size = self.config.times((len(batch.latents_NCHW),), generator)
        sign = torch.where(torch.rand(len(size), generator=generator) < 0.5, -1.0, 1.0)
        drawn = noised(batch, generator, self.config.condition_dropout)
        x = path.interpolate(drawn.latents, drawn.noise, size)
        return drawn.credit({"x": x, "t": sign * size, "target": drawn.noise - drawn.latents})

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        item = minibatch.tensors
        velocity = models["policy"](item["x"], item["t"], minibatch.condition)
        target = path.per_sample(item["t"].sign(), item["target"]) * item["target"]
        loss = forward.velocity_error(velocity, target).mean()
        return LossOutput(loss, {"loss/velocity_mse": loss.detach(), "time/min_t": item["t"].min()})
