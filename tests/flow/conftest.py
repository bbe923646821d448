"""Gaussian data, for which the velocity of the rectified flow is known in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Data ``N(mu, c²)`` in every dimension, independently."""

    mu: float = 0.7
    c: float = 0.5

    def mean(self, t: float | Tensor) -> float | Tensor:
        return (1 - t) * self.mu

    def variance(self, t: float | Tensor) -> float | Tensor:
        return (1 - t) ** 2 * self.c**2 + t**2

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """``E[noise - x0 | x_t = x]`` for ``t`` of shape (N,)."""
        t = t.reshape(-1, *(1,) * (x.ndim - 1))
        return -self.mu + (t - (1 - t) * self.c**2) / self.variance(t) * (x - self.mean(t))

    def ode(self, x: Tensor, t: float, t_next: float) -> Tensor:
        """Exact solution of ``dx/dt = v`` from ``t`` to ``t_next``."""
        scale = (self.variance(t_next) / self.variance(t)) ** 0.5
        return self.mean(t_next) + scale * (x - self.mean(t))


@pytest.fixture(scope="session")
def gaussian() -> Gaussian:
    return Gaussian()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
