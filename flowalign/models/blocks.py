"""The blocks of a network: the layers that are gathered, or brought in, one at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a network that have parameters: what its outermost lists of modules hold."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (layer for layer in child if next(layer.parameters(), None) is not None)
        else:
            yield from blocks_of(child)
