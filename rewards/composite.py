"""Several rewards as one number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rewards.interface import InvalidScores


class Combined(NamedTuple):
    """``total`` float64 (N,), NaN where invalid; ``valid`` bool (N,)."""

    total: NDArray[np.float64]
    valid: NDArray[np.bool_]


def combine(
    by_reward: Mapping[str, NDArray[np.float64]],
    weights: Mapping[str, float],
    valid: Mapping[str, NDArray[np.bool_]],
) -> Combined:
    """Weighted sum over the rewards (N,) whose weight is not 0.

    A sample is valid only if each of them is valid. Raises ``InvalidScores`` where a weighted reward is
    missing.
    """
    used = {name: weight for name, weight in weights.items() if weight != 0}
    if not used:
        raise InvalidScores("no reward has a weight other than 0; give at least one a weight")
    missing = [name for name in used if name not in by_reward]
    if missing:
        raise InvalidScores(
            f"no scores for the weighted reward {missing[0]!r}; the scorers returned {', '.join(sorted(by_reward))}"
        )
    every = np.logical_and.reduce([valid[name] for name in used])
    terms = [weight * np.where(every, by_reward[name], np.nan) for name, weight in used.items()]
    return Combined(np.asarray(np.sum(terms, axis=0), np.float64), np.asarray(every))
