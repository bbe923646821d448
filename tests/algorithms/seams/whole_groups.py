"""Listwise preference: a group's images are ranked together, so that an item is the whole group.

Shapes: B groups, G images of each, C H W latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowalign.algorithm import Calls, LossOutput, Models, Needs
from flowalign.algorithms.parts.points import ForwardAlgorithm, ForwardConfig
from flowalign.flow import forward
from flowalign.types import Credit, Scores, TrainBatch, Trajectories


class Listwise(ForwardAlgorithm):
    """Makes the policy's errors on a group's images rank them as their rewards do: a cross entropy over the group."""

    class Config(ForwardConfig):
        type: str = "listwise"
        timesteps: int = 1
        temperature: float = 0.2

    config: Config

    @property
    def needs(self) -> Needs:
        return Needs(Trajectories, scores=True, group_size=self.config.group_size, whole_groups=True)

    @property
    def network_calls(self) -> Calls:
        return Calls()

    def credit(self, batch: Trajectories, scores: Scores | None) -> Credit:
        assert scores is not None
        sample_BG = torch.arange(len(scores.total)).unflatten(0, (-1, self.config.group_size))
        told = {"reward": scores.total, "group": torch.tensor(batch.batch.group_ids)}
        tensors = {name: values[sample_BG] for name, values in told.items()}
        return Credit(sample_BG, {**tensors, "point": torch.zeros_like(sample_BG)}, len(sample_BG))

    def items(self, batch: Trajectories, credit: Credit) -> TrainBatch:
        return TrainBatch(credit.tensors, batch.condition.take(credit.sample[:, 0]))

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
