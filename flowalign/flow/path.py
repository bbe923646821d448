"""Paths between data and noise, and the conversions between velocity, noise and data.

Shapes: N samples; ``...`` any non-batch dimensions; ``t`` is a float or a tensor of shape () or (N,).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

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
    """Return the point of the rectified-flow path, ``(1 - t) x0 + t noise``.

    ``x0``, ``noise`` (N, ...); ``t`` in [0, 1], () or (N,). Returns (N, ...).
    (arXiv:2403.03206, eq. 13; arXiv:2209.03003)
    """
    t = per_sample(t, x0)
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """Return the conditional velocity of the rectified-flow path, ``noise - x0``, the same at every ``t``.

    ``x0``, ``noise`` (N, ...). Returns (N, ...). (arXiv:2209.03003, where data is at t = 1 and the sign is opposite)
    """
    return noise - x0


def x0_from_velocity(x: Tensor, velocity: Tensor, t: Scalar) -> Tensor:
    """Return the predicted clean data ``x - t v`` on the rectified-flow path.

    ``x``, ``velocity`` (N, ...); ``t`` in [0, 1], () or (N,). Returns (N, ...).
    """
    return x - per_sample(t, x) * velocity


def noise_from_velocity(x: Tensor, velocity: Tensor, t: Scalar) -> Tensor:
    """Return the predicted noise ``x + (1 - t) v`` on the rectified-flow path.

    ``x``, ``velocity`` (N, ...); ``t`` in [0, 1], () or (N,). Returns (N, ...).
    """
    return x + (1 - per_sample(t, x)) * velocity


@dataclass(frozen=True)
class Path:
    """A Gaussian path ``z_t = a(t) x0 + b(t) noise``; each function maps a tensor of times to one of equal shape.

    ``from_rf`` is the time at which ``b / (a + b)`` has a given value, the time of the same noise level on the
    rectified-flow path; its value is not clamped. In float32 a path's time can be too coarse a number for its noise
    level: compute a and b in float64, and round them afterwards.
    (arXiv:2403.03206, eq. 1: a family defines its own endpoints and conversions)
    """

    name: str
    a: Callable[[Tensor], Tensor]
    b: Callable[[Tensor], Tensor]
    da: Callable[[Tensor], Tensor]
    db: Callable[[Tensor], Tensor]
    from_rf: Callable[[Tensor], Tensor]


_HALF_PI = math.pi / 2

RF = Path(
    name="rf",
    a=lambda t: 1 - t,
    b=lambda t: t,
    da=lambda t: -torch.ones_like(t),
    db=torch.ones_like,
    from_rf=lambda s: s,
)
COSINE = Path(
    name="cos",
    a=lambda t: torch.cos(_HALF_PI * t),
    b=lambda t: torch.sin(_HALF_PI * t),
    da=lambda t: -_HALF_PI * torch.sin(_HALF_PI * t),
    db=lambda t: _HALF_PI * torch.cos(_HALF_PI * t),
    from_rf=lambda s: torch.atan2(s, 1 - s) / _HALF_PI,
)


_LINEAR_STEPS = 1000


@lru_cache
def _log_alpha_bar(device: torch.device) -> Tensor:
    """Return float64 (1001,): 0, then ``log alpha_bar`` of the steps 0 to 999 of the schedule of latent diffusion."""
    root_beta = torch.linspace(0.00085**0.5, 0.012**0.5, _LINEAR_STEPS, dtype=torch.float64)
    log_alpha = torch.log1p(-root_beta.square())
    return torch.cat([torch.zeros(1, dtype=torch.float64), log_alpha.cumsum(0)]).to(device)


def _linear(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``log alpha_bar`` and its derivative at ``t``, each in float64 and of the shape of ``t``."""
    knots, position = _log_alpha_bar(t.device), t.double() * _LINEAR_STEPS
    left = position.detach().floor().clamp(0, _LINEAR_STEPS - 1).long()
    value = knots.take(left)
    rise = knots.take(left + 1) - value
    return value + (position - left) * rise, rise * _LINEAR_STEPS


def _linear_b(t: Tensor) -> Tensor:
    # Not 1 - alpha_bar, which loses its digits near data.
    return torch.sqrt(-torch.expm1(_linear(t)[0])).to(t.dtype)


def _linear_db(t: Tensor) -> Tensor:
    log_alpha_bar, slope = _linear(t)
    return (-slope * log_alpha_bar.exp() / (2 * torch.sqrt(-torch.expm1(log_alpha_bar)))).to(t.dtype)


def _linear_da(t: Tensor) -> Tensor:
    log_alpha_bar, slope = _linear(t)
    return (slope / 2 * (log_alpha_bar / 2).exp()).to(t.dtype)


def _linear_from_rf(s: Tensor) -> Tensor:
    knots, target = _log_alpha_bar(s.device), -torch.log1p((s.double() / (1 - s.double())).square())
    right = torch.searchsorted(-knots, -target.detach().contiguous()).clamp(1, _LINEAR_STEPS)
    above, below = knots.take(right - 1), knots.take(right)
    along = (target - above) / (below - above)
    return ((right - 1 + along) / _LINEAR_STEPS).to(s.dtype)


# Latent diffusion's schedule, linear in sqrt(beta) from 0.00085 to 0.012 over 1000 steps (arXiv:2112.10752, as in
# arXiv:2403.03206, sec. 2), made continuous: t = (n + 1) / 1000 has the alpha_bar of step n, t = 0 is clean data with
# alpha_bar = 1, and log(alpha_bar) is linear in between. Its end, t = 1, still holds a little of the data.
LINEAR = Path(
    name="linear",
    a=lambda t: (_linear(t)[0] / 2).exp().to(t.dtype),
    b=_linear_b,
    da=_linear_da,
    db=_linear_db,
    from_rf=_linear_from_rf,
)


def _below_one(t: Tensor) -> Tensor:
    """Return ``t`` in float64; where the noise of EDM's paths would be infinite, the largest number below 1."""
    return t.double().clamp(max=1 - 2**-53)


_TAIL = -5.0


def edm_path(p_mean: float = -1.2, p_std: float = 1.2) -> Path:
    """Build EDM's path ``z = x0 + sigma noise``.

    Its time is the quantile of a log-normal sigma: a uniform t is EDM's density.

    ``b = exp(p_mean + p_std F⁻¹(t))`` with F the standard normal's distribution function; unbounded at t = 1, where
    the largest time below 1 in float64 is taken instead (sigma = 5700 by default).
    (arXiv:2206.00364, table 1; arXiv:2403.03206, sec. 2)
    """

    def quantile(t: Tensor) -> Tensor:
        return torch.special.ndtri(_below_one(t))

    def sigma(t: Tensor) -> Tensor:
        return (p_mean + p_std * quantile(t)).exp().to(t.dtype)

    def slope(t: Tensor) -> Tensor:
        z = quantile(t)
        return (p_std * math.sqrt(2 * math.pi) * (p_mean + p_std * z + z * z / 2).exp()).to(t.dtype)

    def from_rf(s: Tensor) -> Tensor:
        z = (torch.logit(s.double()) - p_mean) / p_std
        # torch's own is 0 below -8.3, where a narrow density still has levels of the grid.
        tail = torch.special.erfc(-z / math.sqrt(2)) / 2
        return torch.where(z < _TAIL, tail, torch.special.ndtr(z)).to(s.dtype)

    return Path(name="edm", a=torch.ones_like, b=sigma, da=torch.zeros_like, db=slope, from_rf=from_rf)


EDM = edm_path()
# EDM's path at the noise levels of the straight and of the cosine path: b is their b / a, and so is the density of the
# log-SNR at a uniform t. Their own loss weighs it alike, exp(-lambda / 2), so that the density is what tells the two
# apart in arXiv:2403.03206, sec. 5.1.
EDM_RF = Path(
    name="edm/rf",
    a=torch.ones_like,
    b=lambda t: (_below_one(t) / (1 - _below_one(t))).to(t.dtype),
    da=torch.zeros_like,
    db=lambda t: (1 - _below_one(t)).pow(-2).to(t.dtype),
    from_rf=RF.from_rf,
)
EDM_COSINE = Path(
    name="edm/cos",
    a=torch.ones_like,
    b=lambda t: torch.tan(_HALF_PI * _below_one(t)).to(t.dtype),
    da=torch.zeros_like,
    db=lambda t: (_HALF_PI * torch.cos(_HALF_PI * _below_one(t)).pow(-2)).to(t.dtype),
    from_rf=COSINE.from_rf,
)
PATHS: dict[str, Path] = {path.name: path for path in (RF, COSINE, LINEAR, EDM, EDM_RF, EDM_COSINE)}
