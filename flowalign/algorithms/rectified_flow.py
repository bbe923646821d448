"""Rectified-flow pretraining (Esser et al. 2024, arXiv:2403.03206, eq. 13 with the velocity target)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from flowalign.algorithm import AlgorithmConfig, LossOutput, Models, seeded
from flowalign.flow import density, path
from flowalign.types import Condition, LatentBatch, Scores, TrainBatch


class RectifiedFlow:
    """Regress ``noise - x0`` at a random time on the straight path."""

    class Config(AlgorithmConfig):
        """Timestep density and conditioning dropout of the pretraining loss."""

        type: str = "rectified_flow"
        density: Literal["uniform", "logit_normal", "mode", "cosmap", "u_shaped"] = "logit_normal"
        density_params: dict[str, float] = Field(default_factory=dict)
        condition_dropout: float = Field(0.1, ge=0, le=1)

    def __init__(self, config: Config) -> None:
        self.config = config

    consumes = LatentBatch
    models = ("policy",)
    needs_scores = False
    rollout_weights = "policy"

    def rollout_plan(self, iteration: int, seed: int) -> None:
        return None

    def prepare(self, batch: LatentBatch, scores: Scores | None, models: Models) -> TrainBatch:
        """Draw time, noise and dropped conditions from the batch's own seed."""
        generator = seeded(batch.seed)
        x0 = batch.latents_NCHW
        count = x0.shape[0]
        t = density.sample(self.config.density, (count,), generator, **self.config.density_params)
        noise = torch.randn(x0.shape, generator=generator)
        drop = torch.rand(count, generator=generator) < self.config.condition_dropout
        condition = batch.condition
        null_row = condition.tokens_PLD.shape[0]
        dropped = Condition(
            torch.cat([condition.tokens_PLD, condition.null_LD[None]]),
            torch.cat([condition.pooled_PE, condition.null_E[None]]),
            torch.where(drop.to(condition.index_N.device), null_row, condition.index_N),
            condition.null_LD,
            condition.null_E,
        )
        tensors = {"x0": x0, "noise": noise.to(x0.device), "t": t.to(x0.device)}
        return TrainBatch(tensors, dropped, total=count)

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        x0, noise, t = (minibatch.tensors[k] for k in ("x0", "noise", "t"))
        velocity = models["policy"](path.interpolate(x0, noise, t), t, minibatch.condition)
        loss = (velocity - path.velocity_target(x0, noise)).square().mean()
        return LossOutput(loss, {"loss/velocity_mse": loss.detach()})
