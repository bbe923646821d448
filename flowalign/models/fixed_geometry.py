"""Calls of a network with batches of one size, so that kernels sum in one order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowalign.algorithm import VelocityModel
from flowalign.types import Condition


def fixed_geometry(model: VelocityModel, size: int) -> VelocityModel:
    """Call ``model`` with exactly ``size`` samples: a smaller batch is padded with copies of its first.

    Kernels choose their order of summation by the batch size, so a short last micro-batch would
    replay the rollout's log-probs only up to rounding.
    """

    def call(x: Tensor, t: Tensor, condition: Condition, **options: Any) -> Tensor:
        count = x.shape[0]
        if count >= size:
            return model(x, t, condition, **options)
        index = torch.cat([torch.arange(count), torch.zeros(size - count, dtype=torch.long)]).to(x.device)
        options = {k: v[index] if isinstance(v, Tensor) and v.ndim else v for k, v in options.items()}
        return model(x[index], t[index], condition.take(index), **options)[:count]

    return call
