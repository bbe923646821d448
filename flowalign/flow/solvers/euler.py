"""Euler steps, order 1; for the diffusion families these are the steps of DDIM."""

from __future__ import annotations

from torch import Tensor

from flowalign.flow.solvers import Callback, VelocityFn


def solve(velocity_fn: VelocityFn, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Integrate ``dx/dt = v`` along ``sigmas`` with Euler steps (order 1).

    ``velocity_fn(x, t)`` takes (N, ...) and (N,); ``x`` (N, ...) the state at ``sigmas[0]``, float32 or float64;
    ``sigmas`` (K + 1,), in either direction. Returns the state (N, ...) at ``sigmas[-1]``.
    """
    grid = sigmas.to(device=x.device, dtype=x.dtype)
    for k in range(len(grid) - 1):
        velocity = velocity_fn(x, grid[k].expand(x.shape[0])).to(x.dtype)
        x = x + velocity * (grid[k + 1] - grid[k])
        if callback is not None:
            callback(k, x)
    return x
