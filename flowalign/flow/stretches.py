"""The stretches of a sampling plan's walk: ODE steps before its window, and after it once for each granularity.

Shapes: K schedule steps, J granularities.
"""

from __future__ import annotations

from collections.abc import Sequence

from flowalign.flow.solvers import evaluations
from flowalign.types import SamplingPlan


def before_window(plan: SamplingPlan) -> Sequence[float]:
    """Return the levels from the noise to the window, one alone where no step comes before it."""
    return plan.sigmas[: plan.noise.window[0] + 1]


def after_window(plan: SamplingPlan) -> list[Sequence[float]]:
    """Return for each of J granularities the levels from the window's end to the data."""
    end = plan.noise.window[1]
    return [(*plan.sigmas[end : plan.num_steps : stride], plan.sigmas[-1]) for stride in plan.branching.granularities]


def velocities(plan: SamplingPlan) -> tuple[int, int]:
    """Count the velocities of a sample's walk: those before the window, and all others. A cache saves some of them."""
    before, *after = (len(levels) - 1 for levels in (before_window(plan), *after_window(plan)))
    asked = [evaluations(plan.solver, steps) if steps else 0 for steps in (before, *after)]
    return asked[0], plan.noise.num_steps + sum(asked[1:])
