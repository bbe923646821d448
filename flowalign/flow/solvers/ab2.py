"""Adams and Bashforth's two-step method, order 2 at one evaluation a step."""

from __future__ import annotations

from torch import Tensor

from flowalign.flow.solvers import Callback, VelocityFn


def solve(velocity_fn: VelocityFn, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Integrate with Adams–Bashforth of two steps; the first step is Euler's. Shapes as in `euler.solve`.

    A step of length h takes the velocity that the last two, h' apart, have in its middle:
    ``v + h / (2 h') (v - v_previous)``. On the straight path that is exact where the velocity is linear in t along a
    trajectory, at the end of the walk as well.
    """
    grid = sigmas.to(device=x.device, dtype=x.dtype)
    previous: Tensor | None = None
    for k in range(len(grid) - 1):
        v = velocity_fn(x, grid[k].expand(x.shape[0])).to(x.dtype)
        middle = v if previous is None else v + (grid[k + 1] - grid[k]) / (2 * (grid[k] - grid[k - 1])) * (v - previous)
        x = x + (grid[k + 1] - grid[k]) * middle
        previous = v
        if callback is not None:
            callback(k, x)
    return x
