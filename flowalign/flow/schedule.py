"""Sigma grids of the sampler, from noise (1) to data (0), and the resolution-dependent shift."""

from __future__ import annotations

import math
from typing import Literal, TypeVar

import torch
from torch import Tensor

Grid = Literal["diffusers", "paper"]
_Value = TypeVar("_Value", float, Tensor)


def shift_sigma(t: _Value, s: float) -> _Value:
    """Shift a timestep towards noise, ``s t / (1 + (s - 1) t)``.

    ``t`` in [0, 1], a float or a tensor of any shape; ``s`` > 0 (1: unchanged). Returns the type and shape of ``t``.
    (arXiv:2403.03206, eq. 23)
    """
    return s * t / (1 + (s - 1) * t)


def resolution_shift(m: float, n: float) -> float:
    """Shift that gives ``m`` pixels (or tokens) the noise that ``n`` had, ``sqrt(m / n)``; both > 0.

    (arXiv:2403.03206, eq. 23)
    """
    return math.sqrt(m / n)


def sigmas(num_steps: int, shift: float = 1.0, grid: Grid = "diffusers", num_train_timesteps: int = 1000) -> Tensor:
    """Noise levels of a trajectory with ``num_steps`` steps.

    ``grid="diffusers"``: the grid of FlowMatchEulerDiscreteScheduler with a static shift, which shifts both its
    endpoints and the points between them, and so ends at a small sigma > 0 before the final 0; ``num_train_timesteps``
    is its resolution. It is the scheduler's bit for bit but where that one rounds its first level to a neighbour of 1,
    as it does at shift 1.18 or 1.32. ``grid="paper"``: linear from 1 to 0, shifted once.

    Returns float32 (num_steps + 1,) on the CPU, falling from exactly 1 to 0. Raises ValueError for fewer than one step,
    a shift that is not positive or so large that two levels are one float32, or an unknown grid.
    (arXiv:2403.03206, sec. 5.3.2)
    """
    if num_steps < 1:
        raise ValueError(f"a schedule needs at least one step, got num_steps={num_steps}")
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}")
    if grid == "diffusers":
        levels = _diffusers_grid(num_steps, shift, num_train_timesteps)
    elif grid == "paper":
        linear = torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps
        levels = shift_sigma(linear, shift).float()
    else:
        raise ValueError(f"unknown sigma grid {grid!r}; known: diffusers, paper")
    if not bool((levels.diff() < 0).all()):
        raise ValueError(f"shift {shift:g} leaves two of {num_steps} steps at one noise level; lower it")
    return levels


def _diffusers_grid(num_steps: int, shift: float, num_train_timesteps: int) -> Tensor:
    # The scheduler shifts its endpoints in float32 when it is built, then the grid between them in float64. A shift
    # leaves 1 where it is, but its float32 value may be 0.99999988 or 1.0000001: the flow SDE divides by 1 - sigma.
    lowest = torch.ones((), dtype=torch.float32) / num_train_timesteps
    first, last = float(num_train_timesteps), shift_sigma(lowest, shift).item() * num_train_timesteps
    stride = (last - first) / max(num_steps - 1, 1)
    timesteps = torch.arange(num_steps, dtype=torch.float64) * stride + first
    if num_steps > 1:
        timesteps[-1] = last
    grid = shift_sigma(timesteps / num_train_timesteps, shift).float()
    return torch.cat([grid, torch.zeros(1)])
