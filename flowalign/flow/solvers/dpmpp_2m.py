"""DPM-Solver++(2M), order 2 at one evaluation a step. (arXiv:2211.01095)"""

from __future__ import annotations

import torch
from torch import Tensor

from flowalign.flow.path import x0_from_velocity
from flowalign.flow.solvers import Callback, VelocityFn


def solve(velocity_fn: VelocityFn, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Integrate with DPM-Solver++(2M), order 2 at one evaluation a step; the last step to t = 0 is of first order.

    Shapes as in `euler.solve`, ``sigmas`` falling. Each step is that of a diffusion with ``alpha = 1 - t``,
    ``sigma = t``, ``lambda = log((1 - t) / t)``. On another path ``z = scale x`` the solver in that path's own
    coordinates takes the same steps: lambda and the predicted data do not change with the scale, and both sides of the
    update scale alike. From t = 1, where lambda is infinite, the first two steps are of first order.
    (arXiv:2211.01095, algorithm 2)
    """
    grid = sigmas.to(device=x.device, dtype=x.dtype).clamp_max(1)  # a scheduler's 1.0000001 has no logarithm
    ends_at_data = (sigmas == 0).tolist()
    steps = (torch.log1p(-grid) - grid.log()).diff()  # h of the paper
    previous = None
    for k in range(len(grid) - 1):
        t, t_next = grid[k], grid[k + 1]
        x0 = x0_from_velocity(x, velocity_fn(x, t.expand(x.shape[0])).to(x.dtype), t)
        ahead = x0
        if previous is not None and not ends_at_data[k + 1]:
            ahead = x0 + steps[k] / (2 * steps[k - 1]) * (x0 - previous)
        # -alpha_next (exp(-h) - 1), in t alone
        x = t_next / t * x + (t - t_next) / t * ahead
        previous = x0
        if callback is not None:
            callback(k, x)
    return x
