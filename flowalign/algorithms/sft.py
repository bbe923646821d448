"""Online fine-tuning on the policy's own images: the best of each group, or all of them weighted by their reward.

Shapes: N samples, T points of each, M = N·T items, C H W latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowalign.algorithm import Calls, LossOutput, Models, Needs, Reference
from flowalign.algorithms.parts.points import ForwardAlgorithm, ForwardConfig
from flowalign.algorithms.parts.reference import velocity_kl_calls, with_velocity_kl
from flowalign.flow import forward
from flowalign.types import Credit, Scores, TrainBatch, Trajectories


class SFT(ForwardAlgorithm):
    """The flow-matching loss on forward-noised final latents, with weights whose mean over a group is 1."""

    class Config(ForwardConfig):
        """The rollout's defaults are NFT's; the others have no public code behind them."""

        type: str = "sft"
        select: Literal["best", "rwr"] = "best"
        """``best``: the best images of each group alike (RAFT, arXiv:2304.06767). ``rwr``: all images by
        ``softmax(R / temperature)`` over their group (reward-weighted regression, Peters and Schaal 2007).
        """
        best_of_group: int = Field(1, ge=1)
        """Best images of a group. RAFT: 1."""
        temperature: float = Field(0.2, gt=0)
        """Temperature of ``rwr``, in units of the reward."""
        beta: float = Field(0.0, ge=0)
        """Weight of the KL to the reference; 0: none."""

        @model_validator(mode="after")
        def _selects(self) -> SFT.Config:
            if self.select == "best" and self.best_of_group >= self.group_size:
                raise ValueError(
                    f"best_of_group: {self.best_of_group} of {self.group_size} images would select them all"
                )
            return self

    config: Config

    @property
    def needs(self) -> Needs:
        c = self.config
        reference = Reference() if c.beta > 0 else None
        return replace(c.rollout_needs, scores=True, reference=reference)

    @property
    def network_calls(self) -> Calls:
        return Calls(loss=velocity_kl_calls(self.config.beta))

    def most_items(self, samples: int) -> int:
        c = self.config
        best = c.select == "best" and c.beta == 0
        return super().most_items(samples // c.group_size * c.best_of_group if best else samples)

    def credit(self, batch: Trajectories, scores: Scores | None) -> Credit:
        """Give the points their image's weight. With β = 0 those of weight 0 are left out."""
        assert scores is not None
        c, own = self.config, batch.batch
        weight, silent = self.weights(scores.total, scores.valid, own.group_ids, own.sample_ids)
        learns, valid = scores.valid if c.beta > 0 else weight > 0, int(scores.valid.sum())
        return c.points_of(learns, {"weight": weight}, {"zero_std_fraction": silent}, images=valid)

    def weights(
        self, rewards: Tensor, valid: Tensor, group_ids: Sequence[int], sample_ids: Sequence[int]
    ) -> tuple[Tensor, float]:
        """Return the weights (N,), and the share of groups without a best image.

        The valid images of a group have the mean weight 1; where fewer than two are valid, or all are rewarded alike,
        there is nothing to prefer and all weights are 0. Of equal images the one with the lowest sample id is better.
        """
        c = self.config
        ids, order = torch.tensor(list(group_ids)), torch.tensor(list(sample_ids))
        result = torch.zeros(len(ids), dtype=torch.float64)
        silent = 0
        for group in ids.unique():
            member = ((ids == group) & valid).nonzero().flatten()
            member = member[order[member].argsort()]
            own = rewards[member].double()
            if own.numel() < 2 or bool(own.max() == own.min()):
                silent += 1
            elif c.select == "rwr":
                result[member] = (own / c.temperature).softmax(0) * own.numel()
            else:
                best = own.argsort(descending=True, stable=True)[: c.best_of_group]
                result[member[best]] = own.numel() / best.numel()
        return result.float(), silent / max(1, len(ids.unique()))

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        """Return ``mean weight·|v - u|² + β·KL``, the KL being ``mean |v - v_ref|²``."""
        c, item = self.config, minibatch.tensors
        velocity = models["policy"](item["x"], item["t"], minibatch.condition)
        loss = (item["weight"] * forward.velocity_error(velocity, item["target"])).mean()
        output = LossOutput(loss, {"loss/weighted_mse": loss.detach()})
        return with_velocity_kl(output, c.beta, velocity, models, minibatch)
