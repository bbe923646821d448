"""Near-duplicates block by block against all pairs at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from flowalign.data.duplicates import near_duplicates
from flowalign.flow.randomness import seeded


def features(num_clusters: int, count: int, seed: int) -> Tensor:
    """Unit vectors about ``num_clusters`` directions, in any order, some of them chains of small turns."""
    g = seeded(seed)
    centres = torch.randn(num_clusters, 16, generator=g, dtype=torch.float64)
    chosen = torch.randint(num_clusters, (count,), generator=g)
    scale = torch.rand(count, 1, generator=g, dtype=torch.float64) * 0.25
    found = centres[chosen] + scale * torch.randn(count, 16, generator=g, dtype=torch.float64)
    return torch.nn.functional.normalize(found, dim=-1)


def brute_force(features_MD: Tensor, threshold: float) -> list[int]:
    near = features_MD @ features_MD.T >= threshold
    first = list(range(len(near)))
    for start in range(len(near)):
        if first[start] != start:
            continue
        stack = [start]
        while stack:
            for other in near[stack.pop()].nonzero()[:, 0].tolist():
                if other > start and first[other] == other:
                    first[other] = start
                    stack.append(other)
    return first


@pytest.mark.parametrize("block", [1, 7, 64, 500])
@pytest.mark.parametrize("threshold", [0.9, 0.97, 0.995])
def test_clusters_are_those_of_the_full_matrix_for_any_block(block: int, threshold: float) -> None:
    own = features(40, 220, seed=1)
    expected = brute_force(own, threshold)
    assert near_duplicates(own, threshold, block=block).tolist() == expected
    assert 40 <= len(set(expected)) < 220


def test_a_chain_is_one_cluster_and_its_first_is_kept() -> None:
    angles = torch.tensor([0.0, 0.3, 2.0, 0.1, 0.2])
    own = torch.stack([angles.cos(), angles.sin()], 1)
    assert near_duplicates(own, float(np.cos(0.11)), block=2).tolist() == [0, 0, 2, 0, 0]


def test_equal_images_are_one_and_none_is_none() -> None:
    assert near_duplicates(torch.ones(300, 1), 0.99, block=64).tolist() == [0] * 300
    assert near_duplicates(torch.empty(0, 4), 0.99).tolist() == []
