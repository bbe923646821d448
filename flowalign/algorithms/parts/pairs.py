"""Pairs of images that a group's scores set against each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def best_worst_pairs(total: Tensor, valid: Tensor, group_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Find the samples (P,) with the highest and the lowest valid score of each group, the first of equals.

    Left out are groups with fewer than two valid samples and those whose scores are all equal.
    """
    ids = torch.tensor(list(group_ids))
    pairs = []
    for group in ids.unique():
        member = ((ids == group) & valid).nonzero().flatten()
        own = total[member]
        if own.numel() > 1 and bool(own.max() > own.min()):
            pairs.append((int(member[own.argmax()]), int(member[own.argmin()])))
    best, worst = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    return best, worst
