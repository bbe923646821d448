"""What analytic tests need of the paths and densities, and no run does: pdfs, scores and log-SNRs in closed form.

Shapes: N samples; ``t`` is a float or a tensor of shape () or (N,).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flowalign.flow import density
from flowalign.flow.path import Path, Scalar, noise_from_velocity, per_sample
from flowalign.flow.pathfamilies import PathFamily
from flowalign.flow.schedule import shift_sigma


def score(x: Tensor, velocity: Tensor, t: Scalar) -> Tensor:
    """Return ``grad log p_t(x) = -(x + (1 - t) v) / t`` on the rectified-flow path, t > 0. (arXiv:2505.05470, sec. 4.2)

    ``x``, ``velocity`` (N, ...). Returns (N, ...).
    """
    return -noise_from_velocity(x, velocity, t) / per_sample(t, x)


def interpolate(path: Path, x0: Tensor, noise: Tensor, t: Scalar) -> Tensor:
    """Return the point ``a x0 + b noise`` of ``path``, (N, ...); a and b are computed in float64."""
    exact = per_sample(t, x0, torch.float64)
    a, b = (per_sample(function(exact), x0) for function in (path.a, path.b))
    return a * x0 + b * noise


def log_snr(path: Path, t: Tensor) -> Tensor:
    """Return ``log(a² / b²)``, infinite at the ends; keeps the shape. (arXiv:2403.03206, sec. 2)"""
    return 2 * (path.a(t).log() - path.b(t).log())


def cfm_weight(path: Path, t: Tensor) -> Tensor:
    """Return ``(b lambda' / 2)²``, which makes a squared error of the noise one of the conditional velocity.

    Keeps the shape; infinite where a is 0. (arXiv:2403.03206, eqs. 8-9)
    """
    a, b, da, db = (function(t) for function in (path.a, path.b, path.da, path.db))
    return (db - da * b / a) ** 2


def raw_output(family: PathFamily, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return what an ideal network of the family says, as its paper writes it; ``t`` broadcasts against ``x0``."""
    a, b = family.path.a(t), family.path.b(t)
    if family.prediction == "edm":
        sigma, data = b, family.sigma_data
        c_skip = data**2 / (sigma**2 + data**2)
        c_out = sigma * data / torch.sqrt(sigma**2 + data**2)
        return (x0 - c_skip * (x0 + sigma * noise)) / c_out
    return {"velocity": noise - x0, "noise": noise, "v": a * noise - b * x0}[family.prediction]


def noise_weight(family: PathFamily, t: Tensor) -> Tensor:
    """Return the factor on the squared error of the noise that makes it that of the raw output; keeps the shape.

    An error of the noise is one of the straight path's velocity times ``a / (a + b)``.
    """
    return family.velocity_weight(t) * (family.scale(t) / family.path.a(t)) ** 2


def pdf(kind: str, t: Tensor, *, shift: float = 1.0, **params: float) -> Tensor:
    """Return the probability density of ``kind``, shifted by ``shift``, at ``t`` inside (0, 1); keeps the shape."""
    return pdf_of(density.density(kind, shift=shift, **params), t)


def pdf_of(chosen: density.Density, t: Tensor) -> Tensor:
    """Return the probability density of ``chosen`` at ``t`` inside (0, 1); keeps the shape."""
    return _PDFS[type(chosen)](chosen, t)


def _logit_normal(own: density.LogitNormal, t: Tensor) -> Tensor:
    z = (torch.logit(t) - own.m) / own.s
    return torch.exp(-z * z / 2) / (own.s * math.sqrt(2 * math.pi) * t * (1 - t))


def _mode(own: density.Mode, t: Tensor) -> Tensor:
    # The map falls from 1 to 0 and has no closed inverse; 60 halvings exhaust float64.
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(60):
        middle = (low + high) / 2
        above = own.from_uniform(middle) > t
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    u = (low + high) / 2
    return 1 / (1 - own.s * (math.pi / 2 * torch.sin(math.pi * u) - 1))


def _u_shaped(own: density.UShaped, t: Tensor) -> Tensor:
    return own.a * torch.cosh(own.a * (t - 0.5)) / (2 * math.sinh(own.a / 2))


def _shifted(own: density.Shifted, t: Tensor) -> Tensor:
    # The shift by 1/s undoes that by s; its derivative is (1/s) / (1 + (1/s - 1) t)².
    return pdf_of(own.base, shift_sigma(t, 1 / own.s)) * own.s / (own.s + (1 - own.s) * t) ** 2


_PDFS: dict[type, Callable[..., Tensor]] = {
    density.Uniform: lambda own, t: torch.ones_like(t),
    density.LogitNormal: _logit_normal,
    density.Mode: _mode,
    density.CosMap: lambda own, t: 2 / (math.pi - 2 * math.pi * t * (1 - t)),
    density.UShaped: _u_shaped,
    density.Shifted: _shifted,
}
