"""Means with the standard errors of samples that come in clusters: those of one prompt are not independent.

Shapes: N samples.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FEWEST = 6  # prompts that differ: of five, equal models favour one and the same in 2 of 2⁵ comparisons, which is 6 %
BETTER, WORSE, NOT_SHOWN = "better", "worse", "no difference shown"


@dataclass(frozen=True)
class ClusteredMean:
    """A mean, its standard error and the degrees of freedom of that; NaN what is not known.

    ``sums`` are what each prompt adds to the mean, (number of prompts,).
    """

    value: float
    standard_error: float
    degrees: float
    sums: NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """By how much the scores of one model exceed those of another, on the same samples.

    ``low`` and ``high`` are the ends of its interval, NaN where none is known. ``differ`` of ``prompts`` prompts have
    another sum of scores under one model than under the other.
    """

    value: float
    standard_error: float
    low: float
    high: float
    prompts: int
    differ: int

    @property
    def verdict(self) -> str:
        """What the interval alone says of the second model: ``better``, ``worse``, or ``no difference shown``."""
        return BETTER if self.low > 0 else WORSE if self.high < 0 else NOT_SHOWN


def clustered_mean(
    values_N: ArrayLike, prompts: Sequence[Hashable], tasks: Sequence[Hashable] | None = None
) -> ClusteredMean:
    """Average N finite values within each task and the tasks with each other; None is one task.

    With m_t the mean of the n_t samples of task t and P_t its prompts, prompt p moves the mean of T tasks by
    u_p = Σ_t √(P_t / (P_t - 1)) Σ_{i of p, t} (x_i - m_t) / (T n_t). The squared standard error is Σ_p u_p²: the
    cluster-robust one (Liang and Zeger 1986; for evaluations Miller 2024, arXiv:2411.00640, "Clustered standard
    errors"), with the usual correction for few clusters. Its degrees of freedom are P - 1 for one task, and for several
    Satterthwaite's (1946). With one sample a prompt it is s/√n. A task of fewer than two prompts has no known error,
    nor has then the mean over tasks.
    """
    x_N = np.asarray(values_N, np.float64)
    prompt_N, task_N = _numbered(prompts), _numbered([0] * len(x_N) if tasks is None else tasks)
    count = 1 + max(prompt_N, default=-1)
    means, variances, degrees = [], [], []
    influence, sums = np.zeros(count), np.zeros(count)
    num_tasks = 1 + int(max(task_N, default=-1))
    for task in range(num_tasks):
        own = task_N == task
        x, prompt, share = x_N[own], prompt_N[own], 1 / (num_tasks * own.sum())
        there = len(np.unique(prompt))
        factor = there / (there - 1) if there > 1 else math.nan
        moved = math.sqrt(factor) * share * np.bincount(prompt, x - x.mean(), count)
        influence += moved
        sums += share * np.bincount(prompt, x, count)
        means.append(x.mean())
        variances.append(np.square(moved).sum())
        degrees.append(there - 1)
    if not means:
        return ClusteredMean(math.nan, math.nan, math.nan, sums)
    v, f = np.array(variances), np.array(degrees)
    freedom = v.sum() ** 2 / (v**2 / f).sum() if np.all(f > 0) and v.sum() > 0 else math.nan
    return ClusteredMean(float(np.mean(means)), float(np.sqrt(np.square(influence).sum())), float(freedom), sums)


def paired_difference(
    before_N: ArrayLike,
    after_N: ArrayLike,
    prompts: Sequence[Hashable],
    tasks: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
) -> Difference:
    """Return by how much the mean over tasks of ``after_N`` exceeds that of ``before_N``, with its interval.

    Both are finite scores of the same N samples. The interval is that of Student's t around the `clustered_mean` of the
    differences, at the confidence ``level`` (paired differences: Miller 2024, arXiv:2411.00640). Fewer than `FEWEST`
    prompts that differ have none: whatever they say, equal models say it in more than 5 % of comparisons.
    """
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    mean = clustered_mean(np.asarray(after_N, np.float64) - np.asarray(before_N, np.float64), prompts, tasks)
    differ, half = int(np.count_nonzero(mean.sums)), math.nan
    if differ >= FEWEST:
        half = float(stdtrit(mean.degrees, (1 + level) / 2)) * mean.standard_error
    return Difference(mean.value, mean.standard_error, mean.value - half, mean.value + half, len(mean.sums), differ)


def _numbered(names: Sequence[Hashable]) -> NDArray[np.intp]:
    """Return the number of each name in the order in which they occur, (N,)."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names], np.intp)
