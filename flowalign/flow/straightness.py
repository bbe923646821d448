"""Straightness of a model's paths, and the loss on the way to the noise and back.

Shapes: N samples, K steps; ``x`` (N, ...), ``sigmas`` (K + 1,).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from flowalign.flow.solvers import VelocityFn

SolverFn = Callable[[VelocityFn, Tensor, Tensor], Tensor]


def straightness(velocity_fn: VelocityFn, x: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``S = int |(z_1 - z_0) - v(z_t, t)|² dt`` along the model's Euler paths, a mean over dimensions, and z_0.

    ``x`` (N, ...) at ``sigmas[0]``; the integral is divided by the time between the ends of ``sigmas``. Returns float32
    (N,), 0 for straight paths of constant speed, and the states (N, ...) at ``sigmas[-1]``. On points between data and
    noise this would be the training loss, which no model brings to 0. (arXiv:2209.03003, eq. 9)
    """
    grid = sigmas.to(x.device, x.dtype)
    start, total = x, float(sigmas[0] - sigmas[-1])
    squares = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    for t, t_next in pairwise(grid):
        velocity = velocity_fn(x, t.expand(x.shape[0]))
        squares += (t - t_next).double() * _mean_square(velocity)
        x = x + velocity * (t_next - t)
    # The mean of the velocities is the chord, so their variance needs no second walk.
    chord = (start - x).double() / total
    return (squares / total - _mean_square(chord)).clamp_min(0).float(), x


def invert(velocity_fn: VelocityFn, x0: Tensor, sigmas: Tensor, solver: SolverFn) -> Tensor:
    """Return the noise (N, ...) that ``x0`` (N, ...) comes from; it walks the same grid from data to noise."""
    return solver(velocity_fn, x0, sigmas.flip(0))


def reconstruction_error(
    velocity_fn: VelocityFn, x0: Tensor, sigmas: Tensor, solver: SolverFn
) -> tuple[Tensor, Tensor]:
    """Return the root mean square of what ``x0`` loses on the way to its noise and back, float32 (N,), and that
    noise."""
    noise = invert(velocity_fn, x0, sigmas, solver)
    back = solver(velocity_fn, noise, sigmas)
    return _mean_square(back - x0).sqrt().float(), noise


def _mean_square(x: Tensor) -> Tensor:
    return x.double().square().flatten(1).mean(1)
