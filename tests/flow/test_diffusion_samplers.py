"""The classic samplers, written out in the coordinates of their papers, are the project's in rectified-flow ones."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

from flowalign.flow.pathfamilies import PATH_FAMILIES, PathFamily, rf_velocity, sampling_sigmas
from flowalign.flow.schedule import sigmas
from flowalign.flow.sde import noisy_steps, reverse_step
from flowalign.flow.solvers.dpmpp_2m import solve as dpmpp_2m
from flowalign.flow.solvers.euler import solve as euler

VARIANCE_PRESERVING = ["eps/linear", "v/linear", "v/cos"]


def noise_network(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A noise prediction (N, D) that is not linear in either of its arguments."""
    t = t.unsqueeze(1).to(z.dtype)
    return torch.sin(2 * z + t) + 0.3 * z * t


def raw_network(family: PathFamily):
    """The same prediction as the raw output of ``family``."""

    def network(z, t):
        # The float32 time is good to 1e-7 on these paths, and so are all comparisons.
        noise, t = noise_network(z, t), t.double().unsqueeze(1)
        a, b = family.path.a(t).to(z.dtype), family.path.b(t).to(z.dtype)
        return noise if family.prediction == "noise" else a * noise - b * (z - b * noise) / a

    return network


def walk(name: str, num_steps: int = 12) -> tuple[PathFamily, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A family, times from 0.95 to 0.04 of its own, their noise levels on the rectified flow, a first state z."""
    family = PATH_FAMILIES[name]
    t = torch.linspace(0.95, 0.04, num_steps + 1, dtype=torch.float64)
    z = torch.randn(3, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return family, t, family.rf_time(t), z


def alpha_bars(family: PathFamily, t: torch.Tensor) -> list[float]:
    return (family.path.a(t) ** 2).tolist()


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_euler_on_the_rectified_flow_is_ddim(name):
    family, t, levels, z = walk(name)
    end = euler(rf_velocity(family, raw_network(family)), z / family.scale(t[0]), levels)
    for k, (alpha, alpha_next) in enumerate(pairwise(alpha_bars(family, t))):
        noise = noise_network(z, t[k].expand(3))
        x0 = (z - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha)
        z = math.sqrt(alpha_next) * x0 + math.sqrt(1 - alpha_next) * noise  # arXiv:2010.02502, eq. 12, sigma = 0
    torch.testing.assert_close(end * family.scale(t[-1]), z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddpm_kind_is_ddim_with_noise(name, eta):
    family, t, levels, z = walk(name, 4)
    velocity = rf_velocity(family, raw_network(family))
    for k, (alpha, alpha_next) in enumerate(pairwise(alpha_bars(family, t))):
        x = z / family.scale(t[k])
        stats = reverse_step("ddpm", x, velocity(x, levels[k].expand(3)), levels[k], levels[k + 1], eta)
        noise = noise_network(z, t[k].expand(3))
        x0 = (z - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha)
        # arXiv:2010.02502, eqs. 16 and 12
        std = eta * math.sqrt((1 - alpha_next) / (1 - alpha)) * math.sqrt(1 - alpha / alpha_next)
        mean = math.sqrt(alpha_next) * x0 + math.sqrt(1 - alpha_next - std**2) * noise
        scale = family.scale(t[k + 1])
        torch.testing.assert_close(stats.mean.double() * scale, mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            stats.std.flatten().double() * scale, torch.full((3,), std).double(), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_ddpm_kind_with_all_its_noise_is_the_posterior_of_ddpm(name):
    family, t, levels, z = walk(name, 6)
    x0 = torch.tanh(z)
    for k, (alpha_bar, alpha_bar_next) in enumerate(pairwise(alpha_bars(family, t))):
        noise = (z - math.sqrt(alpha_bar) * x0) / math.sqrt(1 - alpha_bar)
        stats = reverse_step("ddpm", z / family.scale(t[k]), noise - x0, levels[k], levels[k + 1], 1.0)
        # arXiv:2006.11239, eq. 7
        beta = 1 - alpha_bar / alpha_bar_next
        variance = (1 - alpha_bar_next) / (1 - alpha_bar) * beta
        data_part = math.sqrt(alpha_bar_next) * beta / (1 - alpha_bar)
        state_part = math.sqrt(1 - beta) * (1 - alpha_bar_next) / (1 - alpha_bar)
        scale = family.scale(t[k + 1])
        torch.testing.assert_close(stats.mean.double() * scale, data_part * x0 + state_part * z, rtol=1e-5, atol=1e-5)
        assert stats.std[0].item() * scale.item() == pytest.approx(math.sqrt(variance), rel=1e-5)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddpm_kind_carries_pure_noise_to_the_data(eta, gaussian):
    """From t = 1 to 0, exactly: each step is an affine map of x plus Gaussian noise."""
    grid = sigmas(2000, grid="paper")
    mean, variance = 0.0, 1.0
    probe = torch.tensor([[0.0], [1.0]])
    for t, t_next in pairwise(grid):
        stats = reverse_step("ddpm", probe, gaussian.velocity(probe, t.expand(2)), t, t_next, eta)
        offset, slope = stats.mean[0].item(), (stats.mean[1] - stats.mean[0]).item()
        mean, variance = offset + slope * mean, slope**2 * variance + stats.std[0].item() ** 2
    assert mean == pytest.approx(gaussian.mu, abs=2e-3)
    assert variance == pytest.approx(gaussian.c**2, abs=2e-3)


def test_ddpm_step_from_pure_noise_has_the_std_of_the_limit():
    x, velocity = torch.randn(2, 2, 5)
    stats = reverse_step("ddpm", x, velocity, 1.0, 0.7, 0.6)
    torch.testing.assert_close(stats.std, torch.full((2, 1), 0.6 * 0.7))
    torch.testing.assert_close(stats.mean, 0.3 * (x - velocity) + 0.7 * 0.8 * x)


def test_ddpm_step_of_no_length_changes_nothing():
    x, velocity = torch.randn(2, 2, 5)
    for t in (1.0, 0.4):
        stats = reverse_step("ddpm", x, velocity, t, t, 1.0)
        assert torch.equal(stats.mean, x) and (stats.std == 0).all()
    assert noisy_steps("ddpm", torch.tensor([1.0, 1.0, 0.5, 0.0]), 1.0).tolist() == [False, True, False]


def test_last_ddpm_step_is_the_predicted_data_without_noise():
    x, velocity = torch.randn(2, 2, 5)
    stats = reverse_step("ddpm", x, velocity, 0.3, 0.0, 1.0)
    torch.testing.assert_close(stats.mean, x - 0.3 * velocity)
    assert (stats.std == 0).all()


def dpmpp_2m_of_the_paper(alpha, sigma, x0_of, z: torch.Tensor) -> torch.Tensor:
    """arXiv:2211.01095, algorithm 2, in its own symbols; a last sigma of 0 is reached with a step of first order."""
    lam = [math.log(a / s) if s else math.inf for a, s in zip(alpha, sigma, strict=True)]
    before = now = x0_of(z, 0)
    for i in range(1, len(lam)):
        h = lam[i] - lam[i - 1]
        if i == 1 or not sigma[i]:
            data = now
        else:
            r = (lam[i - 1] - lam[i - 2]) / h
            data = (1 + 1 / (2 * r)) * now - 1 / (2 * r) * before
        z = sigma[i] / sigma[i - 1] * z - alpha[i] * math.expm1(-h) * data
        before = now
        if i < len(lam) - 1:
            now = x0_of(z, i)
    return z


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
@pytest.mark.parametrize("to_data", [False, True])
def test_dpmpp_2m_equals_the_solver_in_diffusion_coordinates(name, to_data):
    family, t, levels, z = walk(name)
    if to_data:
        t, levels = (torch.cat([part, torch.zeros(1, dtype=torch.float64)]) for part in (t, levels))
    alpha, sigma = family.path.a(t).tolist(), family.path.b(t).tolist()

    def x0_of(z, i):
        return (z - sigma[i] * noise_network(z, t[i].expand(3))) / alpha[i]

    end = dpmpp_2m(rf_velocity(family, raw_network(family)), z / family.scale(t[0]), levels)
    expected = dpmpp_2m_of_the_paper(alpha, sigma, x0_of, z)
    torch.testing.assert_close(end * family.scale(t[-1]), expected, rtol=1e-5, atol=1e-5)


def test_dpmpp_2m_equals_the_public_scheduler():
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        lower_order_final=False,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(10)
    family = PATH_FAMILIES["eps/linear"]
    z = start = torch.randn(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for step in scheduler.timesteps:
        noise = noise_network(z, ((step + 1) / 1000).expand(2))
        z = scheduler.step(noise, step, z, return_dict=False)[0]  # pyright: ignore[reportArgumentType]
    scale = family.scale(torch.ones((), dtype=torch.float64))
    end = dpmpp_2m(rf_velocity(family, noise_network), start / scale, sampling_sigmas(family, 10))
    torch.testing.assert_close(end, z, rtol=1e-3, atol=1e-3)


def test_consistency_sampling_is_the_cps_kind_with_all_its_noise():
    x, velocity = torch.randn(2, 2, 5)
    stats = reverse_step("cps", x, velocity, 0.8, 0.5, 1.0)
    torch.testing.assert_close(stats.mean, 0.5 * (x - 0.8 * velocity))
    torch.testing.assert_close(stats.std, torch.full((2, 1), 0.5))
