"""Latents as a row of tokens, as networks take them whose pipelines cut patches themselves."""

from __future__ import annotations

from torch import Tensor


def packed(x: Tensor, patch: int) -> Tensor:
    """Return latents (N, C, h, w) as tokens (N, h w / patch^2, C patch^2), row by row, channels first in each."""
    patches = x.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # N C h p w q
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, like: Tensor, patch: int) -> Tensor:
    """Return tokens as latents of the shape of ``like``."""
    rows, columns = (side // patch for side in like.shape[-2:])
    patches = tokens.unflatten(-1, (-1, patch, patch)).unflatten(1, (rows, columns))  # N h w C p q
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
