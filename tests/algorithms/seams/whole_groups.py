"""Listwise preference: a group's images are ranked together, so that an item is the whole group.

Shapes: B groups, G images of each, C H W latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowalign.algorithm import LossOutput, Models, Needs, Scheduled
from flowalign.algorithms.parts.points import ForwardConfig
from flowalign.flow import forward
from flowalign.types import SamplingPlan, Scores, TrainBatch, Trajectories


class Listwise(Scheduled):
    """Makes the policy's errors on a group's images rank them as their rewards do: a cross entropy over the group."""

    class Config(ForwardConfig):
        type: str = "listwise"
        timesteps: int = 1
        temperature: float = 0.2

    config: Config

    @property
    def needs(self) -> Needs:
        return Needs(Trajectories, scores=True, group_size=self.config.group_size, whole_groups=True)

    def plan(self, iteration: int, seed: int) -> SamplingPlan:
        return self.config.sampling_plan(self.levels())

    def prepare(self, batch: Trajectories, scores: Scores | None, models: Models) -> TrainBatch:
        assert scores is not None
        size = self.config.group_size
        _, tensors = self.config.points(batch, torch.ones(len(batch), dtype=torch.bool))
        tensors |= {"reward": scores.total, "group": torch.tensor(batch.batch.group_ids)}
        grouped = {name: tensor.unflatten(0, (-1, size)) for name, tensor in tensors.items()}
        first = torch.arange(0, len(batch), size)
        return TrainBatch(grouped, batch.condition.take(first), len(first))

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        item, size = minibatch.tensors, self.config.group_size
        assert bool((item["group"] == item["group"][:, :1]).all())
        flat: dict[str, Tensor] = {name: tensor.flatten(0, 1) for name, tensor in item.items()}
        own = torch.arange(len(minibatch)).repeat_interleave(size)
        velocity = models["policy"](flat["x"], flat["t"], minibatch.condition.take(own))
        error_BG = forward.velocity_error(velocity, flat["target"]).unflatten(0, (-1, size))
        wanted_BG = (item["reward"] / self.config.temperature).softmax(1)
        loss = -(wanted_BG * (-error_BG).log_softmax(1)).sum(1).mean()
        return LossOutput(loss, {"loss/listwise": loss.detach()})
