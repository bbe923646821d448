"""DiffusionNFT (Zheng et al. 2025, arXiv:2509.16117): good images against bad ones, on the forward process.

Shapes: N samples, T points of each, M = N·T items, C H W latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from flowalign.algorithm import Call, Calls, LossOutput, Models, Needs, Reference
from flowalign.algorithms.parts.credit import CreditConfig, Std
from flowalign.algorithms.parts.points import ForwardAlgorithm, ForwardConfig
from flowalign.algorithms.parts.reference import velocity_kl_calls, with_velocity_kl
from flowalign.config.sections import Weights
from flowalign.flow import forward
from flowalign.flow.path import per_sample
from flowalign.types import Credit, Scores, TrainBatch, Trajectories


class NFT(ForwardAlgorithm):
    """Contrasts ``v_old ± beta (v - v_old)``, weighted by how good the image is; no SDE, no log-prob, no guidance.

    With ``d = v - v_old`` and ``e = v_old - u`` the loss of an item, under uniform weights, is
    ``|e|² + 2 beta (2r - 1) e·d + beta² |d|²``: the advantage pulls along the flow-matching error of the old policy,
    and a square holds the new one near it. So an image of advantage 0 (r = 1/2) teaches nothing while v = v_old, and
    pulls back to v_old once v has moved: valid images are all kept.
    """

    class Config(ForwardConfig, CreditConfig):
        """Defaults are those of the public code for SD3.5 (NVlabs/DiffusionNFT, ``config/nft.py`` and ``base.py``). Its
        solver is of second order, and its old policy decays by ``min(0.001 i, 0.5)`` in iteration i (OCR: later and up
        to 0.999); here it is the learner's average, with its constant ``ema_decay``.
        """

        type: str = "nft"
        beta: float = Field(1.0, gt=0)
        """Reach of the target: the optimum lies at ``v_old + 2/beta Δ``. NFT's code: 1 (OCR: 0.1)."""
        std: Std = "batch"
        """Divisor of an advantage: the standard deviation of the ``group``, of the ``batch`` (NFT's code), or ``none``.
        """
        weighting: Literal["adaptive", "uniform"] = "adaptive"
        """``adaptive``: every item over its own mean error (NFT's code)."""
        kl_beta: float = Field(0.0, ge=0)
        """Weight of the KL to the reference; 0: none. The code's 1e-4 is 2e-5 here, since it multiplies the loss by
        ``advantage_clip / beta``.
        """
        rollout_weights: Weights = "ema"
        """Weights that make the images; ``ema`` (NFT's code): the average with ``learner.ema_decay``."""

    config: Config

    @property
    def needs(self) -> Needs:
        c = self.config
        reference = Reference() if c.kl_beta > 0 else None
        return replace(c.rollout_needs, scores=True, reference=reference, rollout=True)

    @property
    def network_calls(self) -> Calls:
        return Calls((Call("rollout"),), velocity_kl_calls(self.config.kl_beta))

    def credit(self, batch: Trajectories, scores: Scores | None) -> Credit:
        """Give every point of a valid image ``r = 1/2 + 1/2 clip(A / A_max, ±1)``."""
        assert scores is not None
        c = self.config
        own = c.advantages(scores, batch.batch.group_ids)
        optimality = 0.5 + 0.5 * own.values / c.advantage_clip
        return c.points_of(scores.valid, {"optimality": optimality}, {"zero_std_fraction": own.zero_std_fraction})

    def annotate(self, models: Models, batch: Trajectories, credit: Credit) -> Mapping[str, Tensor]:
        """Draw the points, and ask for the old velocity at each."""
        points = self.config.points(batch, credit)
        old = models["rollout"](points["x"], points["t"], batch.condition.take(credit.sample))
        return {**points, "old_velocity": old}

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        """Return ``r |v⁺ - u|² + (1 - r) |v⁻ - u|²`` (arXiv:2509.16117), plus the KL ``mean |v - v_ref|²``."""
        c, item = self.config, minibatch.tensors
        velocity = models["policy"](item["x"], item["t"], minibatch.condition)
        old, r = item["old_velocity"], item["optimality"]
        positive = c.beta * velocity + (1 - c.beta) * old
        negative = (1 + c.beta) * old - c.beta * velocity
        loss = (r * self._error(positive, item) + (1 - r) * self._error(negative, item)).mean()
        metrics = {
            "loss/contrast": loss.detach(),
            "loss/velocity_mse": forward.velocity_error(velocity, item["target"]).detach().mean(),
            "old/velocity_mse": forward.velocity_error(velocity, old).detach().mean(),
        }
        return with_velocity_kl(LossOutput(loss, metrics), c.kl_beta, velocity, models, minibatch)

    def _error(self, velocity: Tensor, item: Mapping[str, Tensor]) -> Tensor:
        """Return the squared error (M,) of the velocity, or of ``x̂_0`` over its mean absolute error (the public code).

        As ``x̂_0 - x_0 = t (u - v)``, the second is ``t |v - u|² / mean |v - u|``: every item weighs alike, however
        hard its time is to predict.
        """
        error = forward.velocity_error(velocity, item["target"])
        if self.config.weighting == "uniform":
            return error
        t = item["t"]
        absolute = (per_sample(t, velocity) * (velocity.detach() - item["target"])).abs().flatten(1).mean(1)
        return t.square() * error / absolute.clamp_min(1e-5)
