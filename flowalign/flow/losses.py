"""Distances of a prediction from its target other than the squared error, a number a sample.

Shapes: N samples, C channels, ``...`` a sample's own dimensions, d of them in all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

HUBER = 0.00054


def pseudo_huber(difference: Tensor, c: float | None = None) -> Tensor:
    """Return ``sqrt(‖difference‖² + c²) - c`` of (N, ...), with the sum over all dimensions inside: float32 (N,).

    Far from 0 it is the norm, within ``c > 0`` of it a parabola. By default ``c = 0.00054 sqrt(d)``, as in the
    consistency literature (arXiv:2310.14189, sec. 3.3); the public code of arXiv:2405.20320 has ``0.00054 d``, and
    divides the whole by d.
    """
    flat = difference.float().flatten(1)
    if c is None:
        c = HUBER * math.sqrt(flat.shape[1])
    squared = flat.square().sum(1)
    return squared / ((squared + c * c).sqrt() + c)  # the same without its cancellation near 0


def feature_distance(features: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Compute LPIPS without its learned weights: float32 (N,), in [0, 4] for each layer.

    ``features`` and ``target`` are a network's maps, a layer each (N, C, ...). Both are given unit length along their
    channels at every place; the squared distance is averaged over places and summed over layers. Raises ValueError
    where the numbers of layers differ or there are none. (arXiv:1801.03924, eq. 1 with w = 1)
    """
    layers = [
        (normalize(a.float(), dim=1) - normalize(b.float(), dim=1)).square().sum(1).flatten(1).mean(1)
        for a, b in zip(features, target, strict=True)
    ]
    if not layers:
        raise ValueError("a feature distance needs at least one feature map")
    return torch.stack(layers).sum(0)
