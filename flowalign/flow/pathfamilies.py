"""Families of diffusion models: a path, and what the raw output of a network trained on it means.

Every family converts without loss to the rectified flow, in whose coordinates all sampling and alignment is done:
``z = a x0 + b noise`` at the family's own time t is ``x = z / (a + b)`` at the time ``s = b / (a + b)``, and the
predicted data and noise give the velocity ``noise - x0``. An Euler step in x is then a step of DDIM in z.
(arXiv:2403.03206, sec. 2)

Shapes: N samples; ``z``, ``x``, ``output`` (N, ...); ``t``, ``s`` in [0, 1], a float or a tensor of shape () or (N,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from flowalign.config.pathfamilies import FORMULATIONS, canonical, edm_parameters
from flowalign.flow import schedule
from flowalign.flow.path import PATHS, RF, Path, Scalar, edm_path, per_sample

Network = Callable[[Tensor, Tensor], Tensor]  # its input (N, ...), its time (N,) in [0, 1] -> its raw output (N, ...)
EDM_SIGMAS = (0.002, 80.0)  # the noise levels that EDM samples between (arXiv:2206.00364, table 1)
_EDM_RHO = 7
_EDM_HIGHEST = EDM_SIGMAS[1] / (1 + EDM_SIGMAS[1])
_LATEST = 1 - 2.0**-24  # of the times that `density.sample` draws


@dataclass(frozen=True)
class PathFamily:
    """A path, its own t in [0, 1], and what a network's raw output predicts on it.

    ``prediction``: ``velocity`` (``a' x0 + b' noise``, the path's derivative); ``v`` (``a noise - b x0``,
    arXiv:2202.00512, which is the derivative up to a factor); ``noise``; ``edm`` (F of EDM's preconditioning,
    arXiv:2206.00364, table 1, with the data's standard deviation ``sigma_data``; a is 1). Each is ``p x0 + q noise``
    for two functions p and q of t, and the path's own equation beside it gives x0 and noise.

    The family's own training loss is the plain mean square of the raw output's error at a t drawn from its own
    density: uniform for all but ``rf``. An ``edm`` family differs from another in its density of sigma, which is its
    path's: log-normal, or that of the straight path for ``edm/rf`` and of the cosine path for ``edm/cos``. All numbers
    of t are computed in float64 and then rounded.
    """

    name: str
    path: Path
    prediction: Literal["velocity", "v", "noise", "edm"]
    sigma_data: float = 0.5

    @property
    def is_rectified_flow(self) -> bool:
        return self.path is RF and self.prediction == "velocity"

    @property
    def first_time(self) -> Tensor:
        """The family's own time at which sampling begins, float64 (); ``edm`` begins at a sigma, see `sampling_sigmas`.

        It is 1; where the noise is predicted, not beyond EDM's highest ``b / a``: as a vanishes, so does what noise and
        z say of the image.
        """
        one = torch.ones((), dtype=torch.float64)
        return self.own_time(_EDM_HIGHEST * one) if self.prediction == "noise" else one

    @property
    def initial_scale(self) -> float:
        """Standard deviation of x at the first noise level of `sampling_sigmas`, the data's part neglected."""
        if self.prediction == "edm":
            return self._highest_sigma / (1 + self._highest_sigma)
        return float(self.rf_time(self.first_time))

    @property
    def _highest_sigma(self) -> float:
        """EDM's own, or the highest that this family is trained on."""
        return min(EDM_SIGMAS[1], float(self.path.b(torch.tensor(_LATEST, dtype=torch.float64))))

    def rf_time(self, t: Tensor) -> Tensor:
        """Time ``s = b / (a + b)`` of the rectified flow with the noise level of ``t``; keeps shape and dtype."""
        a, b, _, _ = self._coefficients(t)
        return (b / (a + b)).to(t.dtype)

    def own_time(self, s: Tensor) -> Tensor:
        """Return the inverse of `rf_time`, clamped to [0, 1], in float64: EDM's quantiles near 1 need it.

        Keeps the shape.
        """
        return self.path.from_rf(s.double().clamp(0, 1)).clamp(0, 1)

    def scale(self, t: Tensor) -> Tensor:
        """Return ``a + b``, by which ``z = scale x``; keeps shape and dtype."""
        a, b, _, _ = self._coefficients(t)
        return (a + b).to(t.dtype)

    def network_time(self, t: Tensor) -> Tensor:
        """Return the network's time, in [0, 1], float32; the network is told as much, or 1000 times as much.

        It is t itself, for ``edm`` the quantile of sigma and not ``c_noise = ln(sigma) / 4``: the network's
        embedding is made for this range.
        """
        return t.float()

    def network_input(self, z: Tensor, t: Scalar) -> Tensor:
        """Return the network's input: z, for ``edm`` ``c_in z``, which has unit variance."""
        if self.prediction != "edm":
            return z
        b = self.path.b(per_sample(t, z, torch.float64))
        return z * per_sample((b * b + self.sigma_data**2).rsqrt(), z)

    def velocity(self, z: Tensor, output: Tensor, t: Scalar) -> Tensor:
        """Return the velocity ``noise - x0`` of the rectified flow at ``x = z / scale``; shapes (N, ...)."""
        if self.is_rectified_flow:
            return output
        a, b, p, q = self._shaped(t, z)
        return ((a + b) * output - (p + q) * z) / (a * q - b * p)

    def velocity_weight(self, t: Tensor) -> Tensor:
        """Return the factor on the squared error of the straight path's velocity that makes it that of the raw output.

        ``((a q - b p) / (a + b))²``, finite on all of [0, 1]; keeps shape and dtype.
        """
        a, b, p, q = self._coefficients(t)
        return (((a * q - b * p) / (a + b)) ** 2).to(t.dtype)

    def _coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a, b of the path and p, q of the raw output, float64, each of the shape of ``t``."""
        t = t.double()
        a, b = self.path.a(t), self.path.b(t)
        if self.prediction == "velocity":
            return a, b, self.path.da(t), self.path.db(t)
        if self.prediction == "v":
            return a, b, -b, a
        if self.prediction == "noise":
            return a, b, torch.zeros_like(t), torch.ones_like(t)
        # F = (x0 - c_skip z) / c_out with EDM's c_skip and c_out put in, and without their 0 / 0 at sigma = 0.
        root = torch.sqrt(b * b + self.sigma_data**2)
        return a, b, b / (self.sigma_data * root), -self.sigma_data / root

    def _shaped(self, t: Scalar, z: Tensor) -> tuple[Tensor, ...]:
        return tuple(per_sample(value, z) for value in self._coefficients(per_sample(t, z, torch.float64)))


def edm(p_mean: float = -1.2, p_std: float = 1.2, sigma_data: float = 0.5) -> PathFamily:
    """Build EDM with a log-normal sigma, ``ln sigma ~ N(p_mean, p_std²)`` at a uniform t. (arXiv:2206.00364, table
    1)"""
    return PathFamily("edm", edm_path(p_mean, p_std), "edm", sigma_data)


PATH_FAMILIES: dict[str, PathFamily] = {
    name: PathFamily(name, PATHS[kind.path], kind.prediction) for name, kind in FORMULATIONS.items()
}


@cache
def path_family(name: str) -> PathFamily:
    """Return the family of a name in any spelling, ``edm(p_mean, p_std)`` among them.

    Raises ValueError for an unknown one.
    """
    own = canonical(name)
    if own in PATH_FAMILIES:
        return PATH_FAMILIES[own]
    return replace(edm(*edm_parameters(own)), name=own)


def rf_velocity(path_family: PathFamily, network: Network) -> Network:
    """Return the velocity of the rectified flow that ``network``, a model of ``path_family``, predicts.

    ``network(z_in, t_net)`` takes what `PathFamily.network_input` and `PathFamily.network_time` give. Returns a
    function ``velocity(x, s)`` of a state (N, ...) and its time (N,) on the rectified flow; for ``rf`` that is
    ``network`` itself. A noise level beyond the family's highest is taken for the highest.
    """
    if path_family.is_rectified_flow:
        return network

    def velocity(x: Tensor, s: Tensor) -> Tensor:
        t = path_family.own_time(s)
        z = x * per_sample(path_family.scale(t), x)
        return path_family.velocity(z, network(path_family.network_input(z, t), path_family.network_time(t)), t)

    return velocity


def straight(name: str, output: Network) -> Network:
    """Return the velocity on the straight path from the output of a network of the path family ``name``."""
    return output if name == "rf" else rf_velocity(path_family(name), output)


def sampling_sigmas(path_family: PathFamily, num_steps: int, *, shift: float = 1.0) -> Tensor:
    """Return the noise levels, on the rectified flow, that ``path_family`` is sampled at.

    ``rf``: `schedule.sigmas`. ``edm``: sigma of Karras' grid with rho = 7 (arXiv:2206.00364, eq. 5), which
    begins at 80, or at the highest that a narrower density of sigma is trained on. Others: uniform in their own time
    from `PathFamily.first_time` on, mostly 1 ("trailing", arXiv:2305.08891, sec. 3.3). ``shift`` acts on the
    family's own parameter of the grid, so that its first level stays the highest that it was trained on.

    Returns float32 (num_steps + 1,) on the CPU, falling from `PathFamily.initial_scale` to 0. Raises ValueError as
    `schedule.sigmas` does.
    """
    if path_family.is_rectified_flow:
        return schedule.sigmas(num_steps, shift=shift)
    schedule.sigmas(num_steps, shift=shift, grid="paper")  # refuses what is not a schedule
    if path_family.prediction == "edm":
        low, high = (sigma ** (1 / _EDM_RHO) for sigma in (EDM_SIGMAS[0], path_family._highest_sigma))
        place = 1 - torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
        sigma = (low + schedule.shift_sigma(place, shift) * (high - low)) ** _EDM_RHO
        levels = sigma / (1 + sigma)
    else:
        t = torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps
        levels = path_family.rf_time(path_family.first_time * schedule.shift_sigma(t, shift))
    return torch.cat([levels, torch.zeros(1)]).float()
