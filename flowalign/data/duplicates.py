"""Near-duplicates among images, told from their features (arXiv:2403.03206 removes them before training, by SSCD).

Shapes: M images, D features, b rows of a block.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 2048


def near_duplicates(features_MD: Tensor, threshold: float, *, block: int = BLOCK) -> NDArray[np.int64]:
    """Return for each image the first of its cluster, (M,): itself where it is to be kept.

    Clusters are what chains of pairs with a cosine of at least ``threshold`` connect. ``features_MD`` are of unit
    length, on the device that computes. No more than b × b cosines are held at a time; all M (M - 1) / 2 are computed.
    """
    count = len(features_MD)
    first = np.arange(count)
    for top in range(0, count, block):
        rows = features_MD[top : top + block]
        for left in range(top, count, block):
            near = rows @ features_MD[left : left + block].T >= threshold
            i, j = (side.cpu().numpy() for side in near.nonzero(as_tuple=True))
            _join(first, i + top, j + left)
        first = _roots(first)
    return first


def _join(first: NDArray[np.int64], i: NDArray[np.int64], j: NDArray[np.int64]) -> None:
    """Unite the pairs (i, j) in the forest ``first``, whose roots are the smallest of their trees."""
    known = _climb(first, i), _climb(first, j)
    apart = known[0] != known[1]
    if not apart.any():
        return
    pairs = np.unique(np.sort(np.stack([side[apart] for side in known], 1), 1), axis=0)
    for a, b in pairs.tolist():
        a, b = _root(first, a), _root(first, b)
        first[max(a, b)] = min(a, b)


def _root(first: NDArray[np.int64], i: int) -> int:
    while first[i] != i:
        first[i] = first[first[i]]
        i = int(first[i])
    return i


def _climb(first: NDArray[np.int64], i: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the roots of the nodes ``i``."""
    while True:
        above = first[i]
        if np.array_equal(above, i):
            return i
        i = above


def _roots(first: NDArray[np.int64]) -> NDArray[np.int64]:
    return _climb(first, np.arange(len(first)))
