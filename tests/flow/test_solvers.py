from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from flowalign.flow.schedule import sigmas
from flowalign.flow.sde import reverse_step
from flowalign.flow.solvers.ab2 import solve as ab2
from flowalign.flow.solvers.dpmpp_2m import solve as dpmpp_2m
from flowalign.flow.solvers.euler import solve as euler
from flowalign.flow.solvers.heun import solve as heun


def orders(solver, gaussian, counts: list[int]) -> list[float]:
    """Measured order between each two successive step counts, for t from 0.9 to 0.1."""
    x = torch.tensor([[1.5], [-0.4]], dtype=torch.float64)
    exact = gaussian.ode(x, 0.9, 0.1)
    errors = []
    for count in counts:
        grid = torch.linspace(0.9, 0.1, count + 1, dtype=torch.float64)
        errors.append((solver(gaussian.velocity, x, grid) - exact).abs().max().item())
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


def test_euler_converges_with_order_one(gaussian):
    assert orders(euler, gaussian, [40, 80, 160, 320])[-1] == pytest.approx(1, abs=0.05)


def test_heun_converges_with_order_two(gaussian):
    assert orders(heun, gaussian, [40, 80, 160, 320])[-1] == pytest.approx(2, abs=0.05)


def test_dpmpp_2m_converges_with_order_two(gaussian):
    assert orders(dpmpp_2m, gaussian, [40, 80, 160, 320])[-1] == pytest.approx(2, abs=0.05)


def test_ab2_converges_with_order_two(gaussian):
    assert orders(ab2, gaussian, [40, 80, 160, 320])[-1] == pytest.approx(2, abs=0.05)


def test_a_step_of_ab2_is_that_computed_by_hand():
    """v = t from 1 over 0.5 and 0.2 to 0: -0.5 by Euler, then v = 0.5 + 0.3 / (2 · 0.5) · (0.5 - 1) = 0.35, and last
    v = 0.2 + 0.2 / (2 · 0.3) · (0.2 - 0.5) = 0.1, the exact means between the levels.
    """
    states = []
    grid = torch.tensor([1.0, 0.5, 0.2, 0.0], dtype=torch.float64)
    ab2(lambda x, t: t[:, None], torch.zeros(1, 1, dtype=torch.float64), grid, lambda k, x: states.append(x.item()))
    assert states == pytest.approx([-0.5, -0.5 - 0.3 * 0.35, -0.5 - 0.3 * 0.35 - 0.2 * 0.1])


@pytest.mark.parametrize("solver", [ab2, dpmpp_2m])
def test_a_multistep_solver_evaluates_once_a_step_and_reports_each_state(solver, gaussian):
    times, states = [], []

    def velocity_fn(x, t):
        times.append(t)
        return gaussian.velocity(x, t)

    grid = sigmas(6, 3.0)
    end = solver(velocity_fn, torch.randn(2, 5), grid, callback=lambda k, state: states.append((k, state)))
    torch.testing.assert_close(torch.stack(times)[:, 1], grid[:-1], rtol=0, atol=0)
    assert [k for k, _ in states] == list(range(6)) and torch.equal(states[-1][1], end)


@pytest.mark.parametrize("solver", [euler, heun, ab2, dpmpp_2m])
def test_solvers_carry_noise_to_the_data_distribution(solver, gaussian):
    x = torch.tensor([[-1.0], [0.0], [2.0]], dtype=torch.float64)
    end = solver(gaussian.velocity, x, sigmas(1000, grid="paper"))
    torch.testing.assert_close(end, gaussian.mu + gaussian.c * x, rtol=0, atol=5e-3)


@pytest.mark.parametrize("solver", [euler, heun, ab2, dpmpp_2m])
def test_straight_paths_need_one_step(solver):
    x0, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    grid = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(solver(lambda x, t: noise - x0, noise, grid), x0)


def test_euler_is_bitwise_the_ode_kind_of_the_reverse_step(gaussian):
    x = torch.randn(2, 3, 4, 4)
    grid = sigmas(6, 3.0)
    states = []
    euler(gaussian.velocity, x, grid, callback=lambda k, state: states.append(state))
    for k in range(6):
        t = grid[k].expand(2)
        x = reverse_step("ode", x, gaussian.velocity(x, t), grid[k], grid[k + 1], 0.0).mean
        assert torch.equal(x, states[k])


def test_last_heun_step_to_data_is_euler_and_never_evaluates_at_zero(gaussian):
    times = []

    def velocity_fn(x, t):
        assert t.shape == (x.shape[0],)
        times.append(t[0].item())
        return gaussian.velocity(x, t)

    heun(velocity_fn, torch.randn(2, 5), sigmas(4, 1.0))
    assert len(times) == 2 * 4 - 1 and min(times) > 0


@pytest.mark.parametrize("solver", [euler, heun])
def test_solver_undoes_itself_backwards(solver, gaussian):
    x = torch.tensor([[0.3]], dtype=torch.float64)
    grid = torch.linspace(0.9, 0.1, 2001, dtype=torch.float64)
    back = solver(gaussian.velocity, solver(gaussian.velocity, x, grid), grid.flip(0))
    torch.testing.assert_close(back, x, rtol=0, atol=2e-3)


def test_bfloat16_velocity_keeps_a_float32_state():
    end = euler(lambda x, t: x.bfloat16(), torch.randn(2, 5), sigmas(3))
    assert end.dtype == torch.float32
