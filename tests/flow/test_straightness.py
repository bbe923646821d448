"""Straightness and inversion on fields whose paths are known."""

from __future__ import annotations

import math

import torch

from flowalign.flow import schedule
from flowalign.flow.solvers import ode_solver
from flowalign.flow.straightness import invert, reconstruction_error, straightness

X = torch.randn((5, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_constant_velocity_is_straight():
    direction = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found, end = straightness(lambda x, t: direction.expand_as(x), X, schedule.sigmas(7))
    assert found.max() < 1e-12
    torch.testing.assert_close(end, X - direction)


def test_a_velocity_that_grows_with_time_has_its_variance_as_straightness():
    # v = t: the chord is 1/2, and the integral of (t - 1/2)² over [0, 1] is 1/12.
    sigmas = torch.linspace(1, 0, 2001, dtype=torch.float64)
    found, _ = straightness(lambda x, t: t[:, None].expand_as(x), X, sigmas)
    torch.testing.assert_close(found, torch.full((5,), 1 / 12), rtol=1e-3, atol=0)


def test_half_of_the_way_is_judged_by_its_own_length():
    sigmas = torch.linspace(1, 0.5, 2001, dtype=torch.float64)
    found, _ = straightness(lambda x, t: t[:, None].expand_as(x), X, sigmas)
    torch.testing.assert_close(found, torch.full((5,), 0.25 / 12), rtol=1e-3, atol=0)


def test_inversion_of_a_linear_field_is_its_exponential():
    # dx/dt = x: from t = 0 to 1 the state grows by e.
    sigmas = torch.linspace(1, 0, 201, dtype=torch.float64)
    noise = invert(lambda x, t: x, X, sigmas, ode_solver("heun"))
    torch.testing.assert_close(noise, X * math.e, rtol=1e-4, atol=0)


def test_the_reconstruction_error_falls_with_the_order_of_the_solver():
    def errors(solver: object, steps: int) -> float:
        sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return float(reconstruction_error(lambda x, t: x * t[:, None], X, sigmas, solver)[0].mean())  # type: ignore[arg-type]

    euler, heun = ([errors(ode_solver(name), steps) for steps in (10, 20)] for name in ("euler", "heun"))
    assert 1.8 < euler[0] / euler[1] < 2.2
    assert heun[0] < euler[0] / 10
