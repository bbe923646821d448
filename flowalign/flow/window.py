"""The window of steps that are stochastic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Window:
    """The steps of a trajectory that are stochastic: the same for every sample of a group.

    ``full``: every step that can be noisy. ``fixed``: ``size`` steps from ``start`` on. ``random``: ``size`` steps in
    a row, drawn anew for each iteration inside [start, stop). ``sliding``: ``size`` steps in a row that begin at
    ``start`` and move by ``stride`` after ``every`` iterations at a place, until they end at ``stop``; then they begin
    anew (``wrap``) or stay there. With ``decay`` > 0 a place that begins at step s is kept for
    ``ceil(every exp(-decay max(0, s - decay_start)))`` iterations instead, so that early steps get more of them. Steps
    count from 0, the one that leaves the noise; ``stop`` is exclusive, by default the end of the schedule; ``fixed``
    does not use it.

    (MixGRPO, arXiv:2507.21802, sec. 3 and alg. 1. Its public code slides 4 of 25 steps with every = 25, stride = 1,
    wrap and stop = 23, its exponential decay is 0.1 from step 13 on; there the last places are cut off at stop, here a
    window is always whole.)
    """

    kind: Literal["full", "fixed", "random", "sliding"] = "full"
    start: int = 0
    size: int | None = None
    stop: int | None = None
    every: int = 25
    stride: int = 1
    decay: float = 0.0
    decay_start: int = 0
    wrap: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("full", "fixed", "random", "sliding"):
            raise ValueError(f"unknown window {self.kind!r}; known: full, fixed, random, sliding")
        if self.kind != "full" and (self.size is None or self.size < 1):
            raise ValueError(f"a {self.kind} window needs size >= 1, got {self.size}")
        if self.start < 0:
            raise ValueError(f"a window cannot start before step 0, got start={self.start}")
        if self.every < 1 or self.stride < 1 or not self.decay >= 0:
            raise ValueError(
                f"a sliding window needs every >= 1, stride >= 1 and decay >= 0, got {self.every}, {self.stride} and "
                f"{self.decay}"
            )


def sliding_start(window: Window, starts: list[int], iteration: int) -> int:
    """Choose from ``starts``, the places allowed, the one where a sliding ``window`` begins in ``iteration``."""
    places = starts[:: window.stride]
    if places[-1] != starts[-1]:
        places.append(starts[-1])
    factors = [math.exp(-window.decay * max(0, s - window.decay_start)) for s in places]
    stays = [max(1, math.ceil(window.every * factor)) for factor in factors]
    turn = iteration % sum(stays) if window.wrap else iteration
    for place, stay in zip(places, stays, strict=True):
        if turn < stay:
            return place
        turn -= stay
    return places[-1]
