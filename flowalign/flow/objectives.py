"""Terms that losses are made of: pure functions of tensors, each with its metrics.

A term is a scalar, the mean over M items, and detached metrics by name. Shapes: M items, ``...`` their own dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowalign.flow import forward
from flowalign.types import Max, Mean, Metric

Term = tuple[Tensor, dict[str, Metric]]


def clipped_surrogate(
    log_ratio: Tensor, advantage: Tensor, low: float, high: float, *, over: Tensor | None = None
) -> Term:
    """Average ``max(-A·ratio, -A·clip(ratio, 1 - low, 1 + high))`` over the items, PPO's loss of a policy gradient.

    ``log_ratio``, ``advantage`` (M,); ``low``, ``high`` > 0. Each item is divided by ``over`` (M,) where that is given.
    (arXiv:2505.05470, eq. 5; asymmetric: arXiv:2503.14476, sec. 3.1)
    """
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    loss_M = torch.maximum(-advantage * ratio, -advantage * clipped)
    loss = (loss_M if over is None else loss_M / over).mean()
    outside = (1 - ratio > low) | (ratio - 1 > high)
    return loss, {
        "loss/surrogate": loss.detach(),
        "ratio/mean": Mean(ratio.detach().mean()),
        "ratio/clip_fraction": Mean(outside.float().mean()),
    }


def replay_deviation(difference: Tensor) -> dict[str, Metric]:
    """Measure how far log-probs lie from those of the rollout: the largest of ``difference`` (M,)."""
    return {"replay/max_abs_dlogp": Max(difference.detach().abs().max())}


def reference_kl(velocity: Tensor, reference: Tensor) -> Term:
    """Average ``|velocity - reference|²``, both (M, ...): a KL between two policies up to a factor of the time."""
    kl = forward.velocity_error(velocity, reference).mean()
    return kl, {"loss/kl": kl.detach()}
