"""Points of the forward process, where losses are taken that need final latents only and no trajectory.

Shapes: N samples, T points of each, ``...`` a sample's own dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowalign.flow import density


def times(kind: str, count: int, generator: torch.Generator, sigmas: Sequence[float], **params: float) -> Tensor:
    """Draw ``count`` times of one sample, float32 (count,) in (0, 1].

    ``kind="grid"`` takes them from ``sigmas``, the K + 1 noise levels of a trajectory: all but the last, in random
    order, each once before one comes twice. Other kinds are those of `density.sample`, which takes ``params``.
    """
    if kind != "grid":
        return density.sample(kind, (count,), generator, **params)
    levels = torch.tensor(sigmas[:-1])
    rounds = -(-count // len(levels))
    order = torch.cat([torch.randperm(len(levels), generator=generator) for _ in range(rounds)])
    return levels[order[:count]]


def draw(
    kind: str,
    count: int,
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    sigmas: Sequence[float],
    **params: float,
) -> tuple[Tensor, Tensor]:
    """Draw ``count`` times and noises of N samples of ``shape``: float32 (N, count) and (N, count, ...), on the CPU.

    Sample n draws from ``generators[n]`` alone, its times first, so what it gets is the same in every batch.
    ``kind``, ``sigmas`` and ``params`` as in `times`.
    """
    if not generators:
        return torch.zeros(0, count), torch.zeros(0, count, *shape)
    drawn = [
        (times(kind, count, generator, sigmas, **params), torch.randn((count, *shape), generator=generator))
        for generator in generators
    ]
    return torch.stack([t for t, _ in drawn]), torch.stack([noise for _, noise in drawn])


def velocity_error(velocity: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference over the non-batch dimensions of (N, ...): float32 (N,).

    The sum is accumulated in float64, as that of a log-prob is, and so hardly depends on the batch size.
    """
    return (velocity.float() - target.float()).square().flatten(1).mean(1, dtype=torch.float64).float()
