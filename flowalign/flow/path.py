"""Paths between data and noise, and the conversions between velocity, noise, data and score.

Shapes: N samples; ``...`` any non-batch dimensions; ``t`` is a float or a tensor of shape () or (N,).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Scalar = float | Tensor  # a float, or a tensor of shape (), (N,) or (N, 1, ..., 1)


def per_sample(value: Scalar, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Shape a float or a per-sample tensor so that it broadcasts over the non-batch dimensions of ``x``.

    ``value``: float, or tensor of shape (), (N,) or already of ``x.ndim`` dimensions; ``x`` (N, ...).
    Returns a tensor of ``x.ndim`` dimensions on ``x.device``, in ``dtype``, by default at least float32.
    Raises ValueError for any other shape.
    """
    dtype = dtype or torch.promote_types(x.dtype, torch.float32)
    if not isinstance(value, Tensor):
        return torch.full((1,) * x.ndim, value, dtype=dtype, device=x.device)
    value = value.to(device=x.device, dtype=dtype)
    if value.ndim == x.ndim:
        return value
    if value.ndim > 1 or value.numel() not in (1, x.shape[0]):
        raise ValueError(f"x of shape {tuple(x.shape)} needs a value of shape () or (N,), got {tuple(value.shape)}")
    return value.reshape(-1, *(1,) * (x.ndim - 1))


def interpolate(x0: Tensor, noise: Tensor, t: Scalar) -> Tensor:
    """Point of the rectified-flow path, ``(1 - t) x0 + t noise``.

    ``x0``, ``noise`` (N, ...); ``t`` in [0, 1], () or (N,). Returns (N, ...).
    (arXiv:2403.03206, eq. 13; arXiv:2209.03003)
    """
    t = per_sample(t, x0)
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """Conditional velocity of the rectified-flow path, ``noise - x0``, the same at every ``t``.

    ``x0``, ``noise`` (N, ...). Returns (N, ...). (arXiv:2209.03003, where data is at t = 1 and the sign is opposite)
    """
    return noise - x0


def x0_from_velocity(x: Tensor, velocity: Tensor, t: Scalar) -> Tensor:
    """Predicted clean data ``x - t v`` on the rectified-flow path.

    ``x``, ``velocity`` (N, ...); ``t`` in [0, 1], () or (N,). Returns (N, ...).
    """
    return x - per_sample(t, x) * velocity


def noise_from_velocity(x: Tensor, velocity: Tensor, t: Scalar) -> Tensor:
    """Predicted noise ``x + (1 - t) v`` on the rectified-flow path.

    ``x``, ``velocity`` (N, ...); ``t`` in [0, 1], () or (N,). Returns (N, ...).
    """
    return x + (1 - per_sample(t, x)) * velocity


def score_from_velocity(x: Tensor, velocity: Tensor, t: Scalar) -> Tensor:
    """Score ``grad log p_t(x) = -(x + (1 - t) v) / t`` on the rectified-flow path.

    ``x``, ``velocity`` (N, ...); ``t`` in (0, 1], () or (N,): at t = 0 the score is not defined. Returns (N, ...).
    (arXiv:2505.05470, sec. 4.2)
    """
    return -noise_from_velocity(x, velocity, t) / per_sample(t, x)


@dataclass(frozen=True)
class Path:
    """A Gaussian path ``z_t = a(t) x0 + b(t) noise``; each function maps a tensor of times to one of equal shape.

    (arXiv:2403.03206, eq. 1: a family defines its own endpoints and conversions)
    """

    name: str
    a: Callable[[Tensor], Tensor]
    b: Callable[[Tensor], Tensor]
    da: Callable[[Tensor], Tensor]
    db: Callable[[Tensor], Tensor]

    def interpolate(self, x0: Tensor, noise: Tensor, t: Scalar) -> Tensor:
        """Point ``a x0 + b noise`` of this path; ``x0``, ``noise`` (N, ...), ``t`` () or (N,). Returns (N, ...)."""
        t = per_sample(t, x0)
        return self.a(t) * x0 + self.b(t) * noise

    def velocity_target(self, x0: Tensor, noise: Tensor, t: Scalar) -> Tensor:
        """Conditional velocity ``a' x0 + b' noise``; shapes as in `interpolate`. (arXiv:2403.03206, sec. 2)"""
        t = per_sample(t, x0)
        return self.da(t) * x0 + self.db(t) * noise

    def x0_from_velocity(self, z: Tensor, velocity: Tensor, t: Scalar) -> Tensor:
        """Clean data that solves both equations of the path, ``(b' z - b v) / (a b' - a' b)``; shapes (N, ...)."""
        t = per_sample(t, z)
        return (self.db(t) * z - self.b(t) * velocity) / self._determinant(t)

    def noise_from_velocity(self, z: Tensor, velocity: Tensor, t: Scalar) -> Tensor:
        """Noise that solves both equations of the path, ``(a v - a' z) / (a b' - a' b)``; shapes (N, ...)."""
        t = per_sample(t, z)
        return (self.a(t) * velocity - self.da(t) * z) / self._determinant(t)

    def score_from_velocity(self, z: Tensor, velocity: Tensor, t: Scalar) -> Tensor:
        """Score ``-noise / b`` where ``b(t) > 0``; shapes (N, ...). (arXiv:2011.13456, sec. 3)"""
        return -self.noise_from_velocity(z, velocity, t) / self.b(per_sample(t, z))

    def log_snr(self, t: Tensor) -> Tensor:
        """Log signal-to-noise ratio ``log(a² / b²)``; any shape, infinite at the ends. (arXiv:2403.03206, sec. 2)"""
        return 2 * (self.a(t).log() - self.b(t).log())

    def _determinant(self, t: Tensor) -> Tensor:
        return self.a(t) * self.db(t) - self.da(t) * self.b(t)


_HALF_PI = math.pi / 2

RF = Path(
    name="rf",
    a=lambda t: 1 - t,
    b=lambda t: t,
    da=lambda t: -torch.ones_like(t),
    db=torch.ones_like,
)
COSINE = Path(
    name="cos",
    a=lambda t: torch.cos(_HALF_PI * t),
    b=lambda t: torch.sin(_HALF_PI * t),
    da=lambda t: -_HALF_PI * torch.sin(_HALF_PI * t),
    db=lambda t: _HALF_PI * torch.cos(_HALF_PI * t),
)
PATHS: dict[str, Path] = {path.name: path for path in (RF, COSINE)}
