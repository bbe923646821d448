"""Densities of the training timestep ``t`` in (0, 1), a map from a uniform number each. (arXiv:2403.03206, sec. 3.1)"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from flowalign.flow.schedule import shift_sigma

# The nearest float32 neighbours of 0 and 1 on the grid that the uniform generator uses.
_LOWEST, _HIGHEST = 2.0**-24, 1 - 2.0**-24


class Density(Protocol):
    """A map from a uniform variable to ``t``, which keeps the shape of its input."""

    def from_uniform(self, u: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Uniform:
    """The uniform density: every ``t`` alike, as in plain rectified flow. (arXiv:2209.03003)"""

    def from_uniform(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True)
class LogitNormal:
    """``logit t ~ N(m, s²)``, ``s > 0``; m < 0 favours data, m > 0 noise. (arXiv:2403.03206, eq. 19)"""

    m: float = 0.0
    s: float = 1.0

    def __post_init__(self) -> None:
        if self.s <= 0:
            raise ValueError(f"logit_normal needs s > 0, got {self.s}")

    def from_uniform(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.m + self.s * torch.special.ndtri(u))


@dataclass(frozen=True)
class Mode:
    """Mode sampling with heavy tails, ``s`` in [-1, 2 / (pi - 2)]; s = 0 is uniform. (arXiv:2403.03206, eq. 20)"""

    s: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.s <= 2 / (math.pi - 2):
            raise ValueError(f"mode needs s in [-1, {2 / (math.pi - 2):.4f}], where its map is monotonic, got {self.s}")

    def from_uniform(self, u: Tensor) -> Tensor:
        return 1 - u - self.s * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


@dataclass(frozen=True)
class CosMap:
    """The log-SNR density of the cosine schedule, carried over to the straight path. (arXiv:2403.03206, eqs. 21-22)"""

    def from_uniform(self, u: Tensor) -> Tensor:
        sine, cosine = torch.sin(math.pi / 2 * u), torch.cos(math.pi / 2 * u)
        return sine / (sine + cosine)


@dataclass(frozen=True)
class UShaped:
    """``p(t) ~ exp(a t) + exp(a (1 - t))``, ``a > 0``: both ends favoured, for reflow. (arXiv:2405.20320)"""

    a: float = 4.0

    def __post_init__(self) -> None:
        if self.a <= 0:
            raise ValueError(f"u_shaped needs a > 0, got {self.a}; use uniform for the limit a = 0")

    def from_uniform(self, u: Tensor) -> Tensor:
        return 0.5 + torch.asinh((2 * u - 1) * math.sinh(self.a / 2)) / self.a


@dataclass(frozen=True)
class Shifted:
    """Any density after the resolution shift ``t -> s t / (1 + (s - 1) t)``, ``s > 0``. (arXiv:2403.03206, eq. 23)"""

    base: Density
    s: float

    def __post_init__(self) -> None:
        if not self.s > 0:
            raise ValueError(f"a shifted density needs shift > 0, got {self.s}")

    def from_uniform(self, u: Tensor) -> Tensor:
        return shift_sigma(self.base.from_uniform(u), self.s)


Name = Literal["uniform", "logit_normal", "mode", "cosmap", "u_shaped"]
DENSITIES: dict[Name, type[Density]] = {
    "uniform": Uniform,
    "logit_normal": LogitNormal,
    "mode": Mode,
    "cosmap": CosMap,
    "u_shaped": UShaped,
}


def density(kind: str, *, shift: float = 1.0, **params: float) -> Density:
    """Build the density ``kind`` with its parameters.

    ``kind``: uniform | logit_normal(m, s) | mode(s) | cosmap | u_shaped(a). ``shift`` > 0 is the resolution shift that
    its times undergo, 1 for none (see `schedule.resolution_shift`). On a path other than the rectified flow the times
    are that path's own (see `pathfamilies.PathFamily`); uniform there is the density of each diffusion family.
    Raises ValueError for an unknown kind or a parameter out of range, TypeError for a parameter that the kind lacks.
    """
    if kind not in DENSITIES:
        raise ValueError(f"unknown timestep density {kind!r}; known: {', '.join(DENSITIES)}")
    chosen = DENSITIES[kind](**params)
    return chosen if shift == 1 else Shifted(chosen, shift)


def sample(
    kind: str, shape: Sequence[int], generator: torch.Generator, *, shift: float = 1.0, **params: float
) -> Tensor:
    """Draw timesteps from the density ``kind``, shifted by ``shift``, on the generator's device.

    Returns a float32 tensor of ``shape``, every element strictly inside (0, 1). One uniform number is drawn for each
    element, whatever the kind. Raises as `density` does.
    """
    chosen = density(kind, shift=shift, **params)
    u = torch.rand(tuple(shape), generator=generator, device=generator.device, dtype=torch.float64)
    return chosen.from_uniform(u).clamp(_LOWEST, _HIGHEST).float()
