"""Memorised images: the nearest training image of each generated one, and whether it is nearer than others would be.

Shapes: N generated images, M training images, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 2048


@dataclass(frozen=True)
class Nearest:
    """Of each generated image the place of its nearest training image, (N,), their cosine, and that one's own cosine
    with the nearest other training image."""

    place_N: NDArray[np.int64]
    cosine_N: NDArray[np.float64]
    other_N: NDArray[np.float64]

    @property
    def authentic_N(self) -> NDArray[np.bool_]:
        """Whether a generated image is no nearer to its training image than another training image is."""
        return self.cosine_N <= self.other_N


def nearest(generated_ND: NDArray[np.float32], training_MD: NDArray[np.float32]) -> Nearest:
    """Find the training image with the largest cosine for each generated image; of equal ones the first.

    The generated image is authentic where the training image has another training image that is as near to it or
    nearer (Alaa et al. 2022, arXiv:2102.08921, sec. 3.2). Where the training images hold copies of one another a
    memorised image counts as authentic.

    Raises:
        ValueError: there are fewer than two training images, or none that was generated.
    """
    generated, training = _unit(generated_ND), _unit(training_MD)
    if len(training) < 2 or not len(generated):
        raise ValueError(f"{len(generated)} generated and {len(training)} training images; give at least 1 and 2")
    cosine, place = _largest(generated, training)
    rows, back = place.unique(return_inverse=True)
    other, _ = _largest(training[rows], training, own=rows)
    return Nearest(place.numpy(), cosine.double().numpy(), other[back].double().numpy())


def _unit(features: NDArray[np.float32]) -> Tensor:
    rows = torch.from_numpy(np.ascontiguousarray(features, np.float32))
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _largest(rows_ND: Tensor, among_MD: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the largest cosine of each row with any of ``among``, but for its ``own`` place there, and where it is."""
    values, places = [], []
    for begin in range(0, len(rows_ND), BLOCK):
        block = rows_ND[begin : begin + BLOCK]
        best = torch.full((len(block),), -torch.inf)
        where = torch.zeros(len(block), dtype=torch.long)
        for left in range(0, len(among_MD), BLOCK):
            cosines = block @ among_MD[left : left + BLOCK].T
            if own is not None:
                here = own[begin : begin + BLOCK] - left
                inside = ((here >= 0) & (here < cosines.shape[1])).nonzero().flatten()
                cosines[inside, here[inside]] = -torch.inf
            value, place = cosines.max(1)
            better = value > best
            best, where = torch.where(better, value, best), torch.where(better, place + left, where)
        values.append(best)
        places.append(where)
    return torch.cat(values), torch.cat(places)
