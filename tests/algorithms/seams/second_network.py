"""Distribution matching (after DMD2, arXiv:2405.14867): a second network learns what the policy makes.

Shapes: M points, C H W latents.
"""

from __future__ import annotations

import torch
from pydantic import Field

from flowalign.algorithm import Call, Calls, LossOutput, Models, Needs, Reference, Second
from flowalign.algorithms.parts.points import ForwardAlgorithm, ForwardConfig
from flowalign.flow import forward, path
from flowalign.types import Credit, Scores, TrainBatch, Trajectories


class DistributionMatching(ForwardAlgorithm):
    """Moves the policy's images from where the second network's velocity leads to where the reference's does."""

    class Config(ForwardConfig):
        type: str = "distribution_matching"
        second_updates: int = Field(3, ge=1)

    config: Config

    @property
    def needs(self) -> Needs:
        second = Second(updates=self.config.second_updates, learning_rate=2e-3)
        return Needs(Trajectories, group_size=self.config.group_size, reference=Reference(), second=second)

    @property
    def network_calls(self) -> Calls:
        loss = (Call("policy", learns=True), Call("reference"), Call("second"))
        return Calls(loss=loss, second_loss=(Call("second", learns=True),))

    def credit(self, batch: Trajectories, scores: Scores | None) -> Credit:
        return self.config.points_of(torch.ones(len(batch.batch), dtype=torch.bool), {}, {})

    def second_loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        """The flow-matching loss on the policy's own images."""
        item = minibatch.tensors
        velocity = models["second"](item["x"], item["t"], minibatch.condition)
        error = forward.velocity_error(velocity, item["target"]).mean()
        return LossOutput(error, {"velocity_mse": error.detach()})

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        """A loss whose gradient by the policy's image is ``v_ref - v_second``."""
        item, condition = minibatch.tensors, minibatch.condition
        x0 = path.x0_from_velocity(item["x"], models["policy"](item["x"], item["t"], condition), item["t"])
        with torch.no_grad():
            slope = models["reference"](item["x"], item["t"], condition)
            slope -= models["second"](item["x"], item["t"], condition)
        loss = (slope * x0).flatten(1).mean(1).mean()
        return LossOutput(loss, {"loss/matching": slope.square().mean()})
