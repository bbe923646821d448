"""Conditions of tokens and pooled text, as Stable Diffusion 3's."""

from __future__ import annotations

import torch
from torch import Tensor

from flowalign.types import Condition


def text_condition(
    tokens: Tensor, pooled: Tensor, index: Tensor, null_tokens: Tensor, null_pooled: Tensor
) -> Condition:
    """Make the condition of samples ``index`` (N,) of prompts (P, L, D) and (P, E), with one negative prompt."""
    return Condition(
        text={"tokens": tokens, "pooled": pooled},
        null={"tokens": null_tokens[None], "pooled": null_pooled[None]},
        index_N=index,
        null_N=torch.zeros_like(index),
    )
