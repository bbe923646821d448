"""Heun steps, order 2, at two evaluations a step."""

from __future__ import annotations

from torch import Tensor

from flowalign.flow.solvers import Callback, VelocityFn


def solve(velocity_fn: VelocityFn, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Integrate ``dx/dt = v`` along ``sigmas`` with Heun steps (order 2); a step that ends at t = 0 is Euler.

    Shapes as in `euler.solve`; two evaluations a step, ``2 K - 1`` in all when the last sigma is 0.
    (arXiv:2206.00364, algorithm 1, in this convention)
    """
    grid = sigmas.to(device=x.device, dtype=x.dtype)
    ends_at_data = (sigmas == 0).tolist()
    for k in range(len(grid) - 1):
        delta = grid[k + 1] - grid[k]
        slope = velocity_fn(x, grid[k].expand(x.shape[0])).to(x.dtype)
        if not ends_at_data[k + 1]:
            ahead = velocity_fn(x + slope * delta, grid[k + 1].expand(x.shape[0])).to(x.dtype)
            slope = (slope + ahead) / 2
        x = x + slope * delta
        if callback is not None:
            callback(k, x)
    return x
