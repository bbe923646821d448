"""Group-relative credit: rewards of N samples to advantages, groups keyed by id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from flowalign.algorithm import AlgorithmConfig
from flowalign.config.section import Section
from flowalign.types import Scores

Normalize = Literal["total", "per_reward"]
Std = Literal["group", "batch", "none"]


class CreditConfig(AlgorithmConfig):
    """Options of `advantages`."""

    advantage_clip: float = Field(5.0, gt=0)
    """Largest size of an advantage. Flow-GRPO's code: 5."""
    normalize: Normalize = "total"
    """Of several rewards the ``total``, or each alone and then their sum. GDPO (arXiv:2601.05242) and the codes of
    MixGRPO and Flow-Factory: ``per_reward``; those of Flow-GRPO and DanceGRPO: ``total``.
    """
    std: Std = "group"
    """Divisor of an advantage: the standard deviation of the ``group`` (Flow-GRPO, eq. 4), of the ``batch`` (its code
    for several rewards), or ``none``.
    """

    def advantages(self, scores: Scores, group_ids: Sequence[int], images: int = 1) -> Advantages:
        """Give the advantages of N samples; see the function `advantages`."""
        clip, std = self.advantage_clip, self.std
        return advantages(scores, group_ids, normalize=self.normalize, std=std, clip=clip, images=images)


class Keep(Section):
    """The numbers of best and of worst samples of a group that are learned from."""

    best: int = Field(ge=1)
    """Best samples."""
    worst: int = Field(ge=1)
    """Worst samples."""

    def of(self, values: Tensor, valid: Tensor, group_ids: Sequence[int]) -> Tensor:
        """Choose them by ``values`` (N,): bool (N,); see `best_and_worst`."""
        return best_and_worst(values, valid, group_ids, best=self.best, worst=self.worst)


@dataclass(frozen=True)
class Advantages:
    """Those of N samples, (N,), and the share of groups that teach nothing (equal rewards, fewer than two valid)."""

    values: Tensor
    zero_std_fraction: float

    def metrics(self, valid: Tensor) -> dict[str, float]:
        """Describe them: the silent share, and the mean size of the advantages of ``valid`` (N,) samples."""
        magnitude = self.values[valid].abs()
        return {
            "zero_std_fraction": self.zero_std_fraction,
            "advantage/mean_abs": float(magnitude.mean()) if magnitude.numel() else 0.0,
        }


def advantages(
    scores: Scores,
    group_ids: Sequence[int],
    *,
    normalize: Normalize = "total",
    std: Std = "group",
    clip: float = 5.0,
    images: int = 1,
) -> Advantages:
    """Return the advantages of N samples: those of the weighted ``total``, or with ``per_reward`` of each reward alone.

    ``scores`` have N·J rows where each sample was finished into J ``images``, which lie in a row; ``group_ids`` has N.
    """
    shape = (-1, images)
    valid = scores.valid.reshape(shape)
    if normalize == "total":
        return group_advantages(scores.total.reshape(shape), valid, group_ids, std=std, clip=clip)
    by_reward = {name: values.reshape(shape) for name, values in scores.by_reward.items()}
    return per_reward_advantages(by_reward, scores.weights, valid, group_ids, std=std, clip=clip)


def group_advantages(
    rewards: Tensor,
    valid: Tensor,
    group_ids: Sequence[int],
    *,
    std: Std = "group",
    clip: float = 5.0,
    eps: float = 1e-4,
) -> Advantages:
    """Return ``A_i = (R_i - mean_group) / (std + eps)``, clipped to ±``clip``; population std over valid samples.

    A group with fewer than two valid samples, or whose valid rewards are all equal, gets exactly 0,
    as does every invalid sample. (Flow-GRPO, arXiv:2505.05470, eq. 4)

    ``rewards`` and ``valid`` are (N,), or (N, J) where a sample was finished J times: each column is then normalised
    alone, and a sample gets the sum of its advantages, clipped after it. (G²RPO, arXiv:2510.01982, sec. 3.3)
    """
    if rewards.ndim == 1:
        rewards, valid = rewards[:, None], valid[:, None]
    ids = torch.tensor(list(group_ids))
    groups = ids.unique()
    result = torch.zeros_like(rewards, dtype=torch.float64)
    teaches = torch.zeros(len(groups), dtype=torch.bool)
    for j in range(rewards.shape[1]):
        values, usable = rewards[:, j].double(), valid[:, j]
        batch_std = values[usable].std(correction=0) if bool(usable.any()) else values.new_zeros(())
        for g, group in enumerate(groups):
            member = (ids == group) & usable
            own = values[member]
            if own.numel() < 2 or bool(own.max() == own.min()):
                continue
            teaches[g] = True
            scale = {"group": own.std(correction=0) + eps, "batch": batch_std + eps, "none": 1.0}[std]
            result[member, j] = (own - own.mean()) / scale
    silent = int((~teaches).sum())
    return Advantages(result.sum(1).clamp(-clip, clip).float(), silent / max(1, len(groups)))


def per_reward_advantages(
    by_reward: Mapping[str, Tensor],
    weights: Mapping[str, float],
    valid: Tensor,
    group_ids: Sequence[int],
    *,
    std: Std = "group",
    clip: float = 5.0,
    eps: float = 1e-4,
) -> Advantages:
    """Normalise each reward within its groups by itself, sum them by weight, and scale the sum to unit batch std.

    So a reward of small spread is not drowned by one of large spread, which the sum's own std allows (GDPO, Liu et al.
    2026, arXiv:2601.05242, eqs. 4-6). A reward counts where it is finite, which is where it applies. The batch
    mean is 0 by construction and is not subtracted, so a sample without any signal keeps exactly 0. Shapes as in
    :func:`group_advantages`.
    """
    total = torch.zeros(len(valid), dtype=torch.float64)
    silent = []
    for name, weight in weights.items():
        usable = valid & torch.isfinite(by_reward[name])
        own = group_advantages(by_reward[name].nan_to_num(), usable, group_ids, std=std, clip=float("inf"), eps=eps)
        total += weight * own.values.double()
        silent.append(own.values != 0)
    learns = torch.stack(silent).any(0) if silent else torch.zeros(len(valid), dtype=torch.bool)
    counted = valid if valid.ndim == 1 else valid.any(1)
    spread = total[counted].std(correction=0) if bool(counted.any()) else total.new_zeros(())
    ids = torch.tensor(list(group_ids))
    groups = ids.unique()
    quiet = sum(not bool(learns[ids == group].any()) for group in groups)
    scaled = torch.where(learns, total / (spread + eps), total.new_zeros(()))
    return Advantages(scaled.clamp(-clip, clip).float(), quiet / max(1, len(groups)))


def best_and_worst(values: Tensor, valid: Tensor, group_ids: Sequence[int], *, best: int, worst: int) -> Tensor:
    """Return which samples are among the ``best`` highest or ``worst`` lowest of their group: bool (N,).

    ``values``, ``valid`` (N,). A group with no more valid samples than that keeps them all; of equal values the earlier
    sample counts as the better one. (best-of-N: DanceGRPO, arXiv:2505.07818; why the extremes teach the most:
    arXiv:2512.15347)
    """
    ids = torch.tensor(list(group_ids))
    kept = torch.zeros_like(valid)
    for group in ids.unique():
        member = ((ids == group) & valid).nonzero().flatten()
        order = member[values[member].argsort(descending=True, stable=True)]
        kept[order[:best]] = True
        kept[order[max(0, len(order) - worst) :]] = True
    return kept
