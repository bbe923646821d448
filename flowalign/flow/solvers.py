"""ODE solvers over ``velocity_fn(x, t)``, after the style of k-diffusion.

Shapes: N samples, K steps; ``x`` (N, ...), ``t`` (N,), ``sigmas`` (K + 1,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowalign.flow.path import x0_from_velocity

VelocityFn = Callable[[Tensor, Tensor], Tensor]  # (N, ...), (N,) -> (N, ...)
Callback = Callable[[int, Tensor], None]  # index of the step just taken, the state (N, ...) it led to


def euler(velocity_fn: VelocityFn, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
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


def heun(velocity_fn: VelocityFn, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Integrate ``dx/dt = v`` along ``sigmas`` with Heun steps (order 2); a step that ends at t = 0 is Euler.

    Shapes as in `euler`; two evaluations a step, ``2 K - 1`` in all when the last sigma is 0.
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


def evaluations(solver: str, num_steps: int) -> int:
    """How many velocities a walk of ``num_steps`` to t = 0 asks for."""
    return 2 * num_steps - 1 if solver == "heun" else num_steps


def dpmpp_2m(velocity_fn: VelocityFn, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Integrate with DPM-Solver++(2M), order 2 at one evaluation a step; the last step to t = 0 is of first order.

    Shapes as in `euler`, ``sigmas`` falling. Each step is that of a diffusion with ``alpha = 1 - t``, ``sigma = t``,
    ``lambda = log((1 - t) / t)``. On another path ``z = scale x`` the solver in that path's own coordinates takes the
    same steps: lambda and the predicted data do not change with the scale, and both sides of the update scale alike.
    From t = 1, where lambda is infinite, the first two steps are of first order. (arXiv:2211.01095, algorithm 2)
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
