"""Advantage-weighted matching (Xue et al. 2025, arXiv:2509.25050): a policy gradient through the pretraining loss.

Shapes: N samples, T points of each, M = N·T items, C H W latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from flowalign.algorithm import Call, Calls, LossOutput, Models, Needs
from flowalign.algorithms.parts.credit import CreditConfig, Std
from flowalign.algorithms.parts.points import ForwardAlgorithm, ForwardConfig
from flowalign.algorithms.parts.reference import ReferenceConfig, velocity_kl_calls, with_velocity_kl
from flowalign.flow import forward, objectives
from flowalign.types import Credit, Scores, TrainBatch, Trajectories

_TINY = 1e-10


class AWM(ForwardAlgorithm):
    """PPO on the surrogate ``log p ≈ -w(|v - u|², t)`` of forward-noised final latents.

    On-policy the gradient is that of the flow-matching loss with every image weighted by its advantage.
    """

    class Config(ForwardConfig, CreditConfig, ReferenceConfig):
        """Defaults are those of the public code for SD3.5 (scxue/advantage_weighted_matching, ``config/dgx_awm.py``),
        but for the weighting and the KL. Its KL to the reference, 0.003 (PickScore: 1e-4) beside advantages that it
        divides by 5, is ``beta`` 0.015 here; with 0 bad images push the policy away without bound, and shapes
        collapses. In place of its second KL, to an average of the policy, stands ``reference_refresh``.
        """

        type: str = "awm"
        num_steps: int = Field(14, ge=1)
        """ODE steps of the rollout. AWM's code: 14."""
        timesteps: int = Field(6, ge=1)
        """Points at which an image is learned. AWM's code: 6 of 14 levels, without the first and the last tenth."""
        std: Std = "batch"
        """Divisor of an advantage: the standard deviation of the ``group``, of the ``batch`` (AWM's code), or ``none``.
        """
        clip_range: float | None = Field(1.0, gt=0)
        """Distance from 1 at which the ratio is clipped. AWM's code: 1. Null: no ratio and no old log-prob,
        ``-A·log p``, which has the same gradient with one update an iteration and ``rollout_weights: model``.
        """
        weighting: Literal["uniform", "t", "ghuber"] = "uniform"
        """Weight of the surrogate. AWM's code has ``ghuber``, whose gradient grows without bound where the error is
        small, so that bad images can drive the policy away.
        """
        ghuber_power: float = Field(0.25, gt=0, le=1)
        """Power of ``ghuber``. AWM's code: 0.25."""

    config: Config

    @property
    def needs(self) -> Needs:
        c = self.config
        return replace(c.rollout_needs, scores=True, reference=c.reference, rollout=c.clip_range is not None)

    @property
    def network_calls(self) -> Calls:
        anew = (Call("rollout"),) * (self.config.clip_range is not None)
        return Calls(anew, velocity_kl_calls(self.config.beta))

    def credit(self, batch: Trajectories, scores: Scores | None) -> Credit:
        """Give the points their image's advantage. With β = 0 those of advantage 0 are left out."""
        assert scores is not None
        c, valid = self.config, scores.valid
        own = c.advantages(scores, batch.batch.group_ids)
        learns = valid if c.beta > 0 else own.values != 0
        return c.points_of(learns, {"advantage": own.values}, own.metrics(valid), images=int(valid.sum()))

    def annotate(self, models: Models, batch: Trajectories, credit: Credit) -> Mapping[str, Tensor]:
        """Draw the points, and ask for the old log-prob of each where there is a ratio."""
        points = self.config.points(batch, credit)
        if self.config.clip_range is None:
            return points
        old = models["rollout"](points["x"], points["t"], batch.condition.take(credit.sample))
        return {**points, "old_log_prob": self.log_prob(old, points)}

    def log_prob(self, velocity: Tensor, item: Mapping[str, Tensor]) -> Tensor:
        """Return the surrogate (M,), with ``l = mean (v - u)²``: ``-l``, ``-t l``, or ``-(t / p) ((l + ε)^p -
        ε^p)``."""
        error = forward.velocity_error(velocity, item["target"])
        if self.config.weighting == "uniform":
            return -error
        if self.config.weighting == "ghuber":
            power = self.config.ghuber_power
            error = ((error + _TINY) ** power - _TINY**power) / power
        return -item["t"] * error

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        """Return ``mean max(-A·ratio, -A·clip(ratio, 1 ± c)) + β·KL``; the KL is ``mean |v - v_ref|²``."""
        c, item = self.config, minibatch.tensors
        velocity = models["policy"](item["x"], item["t"], minibatch.condition)
        log_prob, advantage = self.log_prob(velocity, item), item["advantage"]
        if c.clip_range is None:
            loss = (-advantage * log_prob).mean()
            metrics = {"loss/surrogate": loss.detach()}
        else:
            difference = log_prob - item["old_log_prob"]
            loss, metrics = objectives.clipped_surrogate(difference, advantage, c.clip_range, c.clip_range)
            if c.rollout_weights == "model":
                metrics |= objectives.replay_deviation(difference)
        return with_velocity_kl(LossOutput(loss, metrics), c.beta, velocity, models, minibatch)
