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
    applies: Mapping[str, NDArray[np.bool_]] | None = None,
) -> Combined:
    """Weighted sum over the rewards (N,) whose weight is not 0.

    A reward counts where it ``applies`` (default: everywhere). A sample is valid only if some reward applies to it and
    each that does is valid. Raises ``InvalidScores`` where a weighted reward is missing.
    """
    applies = applies or {}
    used = {name: weight for name, weight in weights.items() if weight != 0}
    if not used:
        raise InvalidScores("no reward has a weight other than 0; give at least one a weight")
    missing = [name for name in used if name not in by_reward]
    if missing:
        raise InvalidScores(
            f"no scores for the weighted reward {missing[0]!r}; the scorers returned {', '.join(sorted(by_reward))}"
        )
    counts = {name: applies.get(name, np.ones(len(valid[name]), bool)) for name in used}
    usable = [valid[name] | ~counts[name] for name in used]
    every = np.logical_and.reduce(usable) & np.logical_or.reduce(list(counts.values()))
    terms = [weight * np.where(counts[name] & every, by_reward[name], 0) for name, weight in used.items()]
    return Combined(np.where(every, np.sum(terms, axis=0), np.nan), np.asarray(every))
