"""Sigma grids of the sampler, from noise (1) to data (0), and the resolution-dependent shift."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

Grid = Literal["diffusers", "paper"]
WalkGrid = Literal["pipeline", "paper", "diffusers"]
Shift = float | Literal["auto"] | None
_BESIDE_ONE = 1e-6
_Value = TypeVar("_Value", float, Tensor)


def shift_sigma(t: _Value, s: float) -> _Value:
    """Shift a timestep towards noise, ``s t / (1 + (s - 1) t)``.

    ``t`` in [0, 1], a float or a tensor of any shape; ``s`` > 0 (1: unchanged). Returns the type and shape of ``t``.
    (arXiv:2403.03206, eq. 23)
    """
    return s * t / (1 + (s - 1) * t)


def resolution_shift(m: float, n: float) -> float:
    """Return the shift that gives ``m`` pixels (or tokens) the noise that ``n`` had, ``sqrt(m / n)``; both > 0.

    (arXiv:2403.03206, eq. 23)
    """
    return math.sqrt(m / n)


def sigmas(num_steps: int, shift: float = 1.0, grid: Grid = "diffusers", num_train_timesteps: int = 1000) -> Tensor:
    """Return the noise levels of a trajectory with ``num_steps`` steps.

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
        raise ValueError(f"shift: must be positive, got {shift}")
    if grid == "diffusers":
        levels = _diffusers_grid(num_steps, shift, num_train_timesteps)
    elif grid == "paper":
        linear = torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps
        levels = shift_sigma(linear, shift).float()
    else:
        raise ValueError(f"unknown sigma grid {grid!r}; known: diffusers, paper")
    if not bool((levels.diff() < 0).all()):
        raise ValueError(f"shift: {shift:g} leaves two of {num_steps} steps at one noise level; lower it")
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


def checked_levels(levels: Tensor, what: str) -> Tensor:
    """Return ``levels`` (K + 1,), with a first one that is 1 but for its rounding made exactly 1.

    Raises ValueError, naming ``what`` they are, unless they fall from 1 to 0, each a number.
    """
    levels = levels.clone()
    if abs(float(levels[0]) - 1) < _BESIDE_ONE:
        levels[0] = 1.0
    if not (float(levels[0]) == 1 and float(levels[-1]) == 0 and bool((levels.diff() < 0).all())):
        shown = ", ".join(f"{level:.4g}" for level in levels.tolist()[:4])
        raise ValueError(f"num_steps: {what} does not fall from 1 to 0, it begins {shown}; choose another number")
    return levels


@dataclass(frozen=True)
class PipelineSchedule:
    """The noise levels that a model's own pipeline walks, at one image size; by default a static scheduler of shift 1.

    ``shift``: how far they are shifted at this size; ``resolution``: the root of the size over the model's own
    (arXiv:2403.03206, eq. 23); ``dynamic``: the shift is a function of the size; ``converts``: the option, if any, that
    makes other levels of them (karras, a terminal level, ...); ``named_shift``: what the scheduler's file calls its
    shift, which a dynamic one does not use; ``num_train_timesteps``: what the network is told of t is so many times t;
    ``is_given``: the pipeline hands the scheduler levels of its own; ``make``: levels of a number of steps, and of a
    static shift in the place of the scheduler's own.
    """

    shift: float = 1.0
    resolution: float = 1.0
    dynamic: bool = False
    converts: str | None = None
    named_shift: float = 1.0
    num_train_timesteps: int = 1000
    is_given: bool = False
    make: Callable[[int, float | None], Tensor] | None = None

    @property
    def is_static(self) -> bool:
        """True where ``sigmas(..., grid="diffusers")`` at this shift is what the pipeline walks."""
        return not self.dynamic and self.converts is None and not self.is_given and self.num_train_timesteps == 1000

    def shift_of(self, shift: Shift) -> float | None:
        """Return a configured shift as a number.

        ``auto`` is the scheduler's own times the resolution's. None is returned for None, the scheduler's own left
        alone.

        Raises ValueError for ``auto`` beside a dynamic shift, which follows the size already.
        """
        if shift != "auto":
            return shift
        if self.dynamic:
            raise ValueError("shift: auto is for a static shift; this model's scheduler shifts by the size already")
        return self.shift * self.resolution

    def levels(self, num_steps: int, shift: Shift = None, grid: WalkGrid = "pipeline") -> Tensor:
        """Return the noise levels of a walk, float32 (num_steps + 1,), falling from exactly 1 to 0.

        ``grid="pipeline"``: the pipeline's own, whose shift a number or ``auto`` replaces; ``paper``: linear, shifted
        once; ``diffusers``: the static grid of version 0.1, whatever the scheduler says beside its shift.

        Raises ValueError where there are no such levels.
        """
        static = self.shift_of(shift)
        if grid == "pipeline" and self.make is not None:
            return self.make(num_steps, static)
        if grid == "paper":
            return sigmas(num_steps, self.shift if static is None else static, "paper")
        if grid == "diffusers" and self.num_train_timesteps != 1000:
            raise ValueError(
                f"grid: the walk of version 0.1 took 1000 for num_train_timesteps, here it is "
                f"{self.num_train_timesteps}; write grid: pipeline"
            )
        own = self.shift if grid == "pipeline" else self.named_shift
        return sigmas(num_steps, own if static is None else static, "diffusers")

    def replacement(self, shift: Shift) -> str | None:
        """Return one line where a configured ``shift`` takes the place of the scheduler's own, and for ``auto`` its
        value; None where it is the scheduler's own."""
        static = self.shift_of(shift)
        if static is None or (static == self.shift and not self.dynamic):
            return f"shift {static:g} (auto), which is the model's scheduler's own" if shift == "auto" else None
        asked = f"{static:g} (auto)" if shift == "auto" else f"{static:g}"
        own = f"its dynamic one, {self.shift:.4g} at this size" if self.dynamic else f"its own {self.shift:g}"
        return f"shift {asked} replaces the model's scheduler's: {own}, which evaluation, samples and exports keep"
