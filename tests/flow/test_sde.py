from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from flowalign.flow import sde
from flowalign.flow.schedule import sigmas
from flowalign.flow.sde import reverse_step

GOLDEN = Path(__file__).resolve().parents[3] / "shared/data/golden/sde_public.json"
CASES = json.loads(GOLDEN.read_text())["cases"] if GOLDEN.exists() else []
golden = pytest.mark.skipif(not CASES, reason=f"no golden values at {GOLDEN}")
STOCHASTIC = ("flow", "dance", "cps")

Pair = tuple[torch.Tensor, torch.Tensor]


@golden
@pytest.mark.parametrize("index", range(max(len(CASES), 1)))
def test_schedule_equals_the_public_one(index):
    case = CASES[index]
    expected = torch.tensor(case["sigmas"])
    torch.testing.assert_close(sigmas(case["num_steps"], case["shift"]), expected, rtol=0, atol=1e-7)


@golden
@pytest.mark.parametrize("index", range(max(len(CASES), 1)))
@pytest.mark.parametrize("kind", STOCHASTIC)
def test_step_equals_the_public_reference(kind, index):
    case = CASES[index]
    x, velocity, x_next, mean = (
        torch.tensor(values).reshape(case["shape"])
        for values in (case["x"], case["velocity"], case["x_next"], case[kind]["mean"])
    )
    stats = reverse_step(kind, x, velocity, case["sigma"], case["sigma_next"], case["noise_level"], case["sigma_max"])
    if kind == "cps":
        log_prob = sde.log_prob_mean_unnormalised(x_next, stats.mean)
    else:
        log_prob = sde.log_prob_mean(x_next, stats.mean, stats.std)
    torch.testing.assert_close(stats.mean, mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(stats.std.flatten(), torch.tensor(case[kind]["std"]).expand(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(log_prob, torch.tensor(case[kind]["log_prob_mean"]), rtol=0, atol=1e-5)


def moments(kind, gaussian, grid: torch.Tensor, noise_level: float) -> tuple[float, float]:
    """Mean and variance after the whole grid, exactly: each step is an affine map of x plus Gaussian noise."""
    mean, variance = float(gaussian.mean(grid[0])), float(gaussian.variance(grid[0]))
    probe = torch.tensor([[0.0], [1.0]])
    for t, t_next in pairwise(grid):
        stats = reverse_step(kind, probe, gaussian.velocity(probe, t.expand(2)), t, t_next, noise_level, grid[1])
        offset, slope = stats.mean[0].item(), (stats.mean[1] - stats.mean[0]).item()
        mean, variance = offset + slope * mean, slope**2 * variance + stats.std[0].item() ** 2
    return mean, variance


@pytest.mark.parametrize(
    ("kind", "noise_level"), [("flow", 0.7), ("dance", 0.7), ("flow", 0.3), ("dance", 0.3), ("ddpm", 0.7)]
)
def test_marginals_of_the_ode_are_kept_with_weak_order_one(kind, noise_level, gaussian):
    errors = []
    for num_steps in (50, 100, 200):
        mean, variance = moments(kind, gaussian, torch.linspace(0.9, 0.1, num_steps + 1), noise_level)
        errors.append((abs(mean - gaussian.mean(0.1)), abs(variance - gaussian.variance(0.1))))
    mean_errors, variance_errors = zip(*errors, strict=True)
    assert variance_errors[-1] < 5e-3 and mean_errors[-1] < 5e-3
    assert math.log2(variance_errors[1] / variance_errors[2]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", ["flow", "dance", "ddpm"])
def test_sampled_trajectories_have_the_marginal_of_the_ode(kind, gaussian, generator):
    grid = torch.linspace(0.9, 0.1, 101)
    noise = torch.randn(40_000, 1, generator=generator)
    x = gaussian.mean(0.9) + gaussian.variance(0.9) ** 0.5 * noise
    for t, t_next in pairwise(grid):
        stats = reverse_step(kind, x, gaussian.velocity(x, t.expand(len(x))), t, t_next, 0.7, grid[1])
        x = stats.mean + stats.std * torch.randn(x.shape, generator=generator)
    assert x.mean().item() == pytest.approx(gaussian.mean(0.1), abs=0.015)
    assert x.var().item() == pytest.approx(gaussian.variance(0.1), abs=0.01)


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
def test_cps_follows_its_own_recursion(noise_level, gaussian):
    grid = torch.linspace(0.9, 0.1, 21)
    angle = noise_level * math.pi / 2
    mean, variance = gaussian.mean(0.9), gaussian.variance(0.9)
    for t, t_next in pairwise(grid.tolist()):
        marginal = gaussian.variance(t)
        data, noise = (1 - t) * gaussian.c**2 / marginal, t / marginal
        slope = (1 - t_next) * data + t_next * math.cos(angle) * noise
        centred = mean - gaussian.mean(t)
        mean = (1 - t_next) * gaussian.mu + slope * centred
        variance = slope**2 * variance + (t_next * math.sin(angle)) ** 2
    assert moments("cps", gaussian, grid, noise_level) == pytest.approx((mean, variance), abs=2e-6)


def test_one_small_cps_step_shrinks_the_variance_by_the_closed_form(gaussian):
    t, noise_level = 0.5, 0.7
    _, variance = moments("cps", gaussian, torch.tensor([t, t - 1e-5]), noise_level)
    a, b = (1 - t) ** 2 * gaussian.c**2, t**2
    shrinkage = a * b * (1 - math.cos(noise_level * math.pi / 2)) ** 2 / (a + b)
    assert gaussian.variance(t) - variance == pytest.approx(shrinkage, rel=1e-3)


@pytest.fixture
def batch(generator) -> Pair:
    return torch.randn(5, 4, 3, 3, generator=generator), torch.randn(5, 4, 3, 3, generator=generator)


@pytest.mark.parametrize("kind", ["flow", "dance", "ddpm"])
def test_noise_level_zero_is_bitwise_an_euler_step(kind, batch: Pair):
    stats = reverse_step(kind, *batch, 0.8, 0.6, 0.0, 0.9)
    assert torch.equal(stats.mean, reverse_step("ode", *batch, 0.8, 0.6, 0.0).mean)
    assert (stats.std == 0).all()


def test_cps_with_noise_level_zero_is_an_euler_step(batch: Pair):
    stats = reverse_step("cps", *batch, 0.8, 0.6, 0.0)
    torch.testing.assert_close(stats.mean, reverse_step("ode", *batch, 0.8, 0.6, 0.0).mean, rtol=0, atol=1e-6)
    assert (stats.std == 0).all()


def test_cps_last_step_is_the_predicted_data_without_noise(batch: Pair):
    stats = reverse_step("cps", *batch, 0.3, 0.0, 0.7)
    torch.testing.assert_close(stats.mean, batch[0] - 0.3 * batch[1])
    assert (stats.std == 0).all()


def test_first_flow_step_injects_the_noise_level(batch: Pair):
    grid = sigmas(10, 1.0, grid="paper")
    stats = reverse_step("flow", *batch, grid[0], grid[1], 0.7, grid[1])
    torch.testing.assert_close(stats.std, torch.full((5, 1, 1, 1), 0.7))
    assert stats.mean.isfinite().all()


@pytest.mark.parametrize("kind", sde.KINDS)
def test_mixed_steps_equal_single_steps_bitwise(kind, batch: Pair):
    grid = sigmas(8, 3.0)
    steps = torch.tensor([0, 3, 7, 1, 0])
    mixed = reverse_step(kind, *batch, grid[steps], grid[steps + 1], 0.7, grid[1])
    x_next = mixed.mean + mixed.std * batch[1]
    log_prob = sde.log_prob_mean(x_next, mixed.mean, mixed.std)
    assert mixed.std.shape == (5, 1, 1, 1)
    for n, k in enumerate(steps.tolist()):
        for sigma, sigma_next in ((grid[k], grid[k + 1]), (grid[k].item(), grid[k + 1].item())):
            single = reverse_step(kind, *batch, sigma, sigma_next, 0.7, grid[1])
            assert torch.equal(single.mean[n], mixed.mean[n]) and torch.equal(single.std[n], mixed.std[n])
            alone = sde.log_prob_mean(x_next[n : n + 1], single.mean[n : n + 1], single.std[n : n + 1])
            assert torch.equal(alone.nan_to_num(), log_prob[n : n + 1].nan_to_num())


def test_log_prob_of_a_sample_does_not_depend_on_its_place_in_a_batch(generator):
    x_next, mean = torch.randn(37, 16, 8, 8, generator=generator), torch.randn(37, 16, 8, 8, generator=generator)
    std = torch.rand(37, generator=generator) + 0.01
    whole = sde.log_prob_mean(x_next, mean, std)
    order = torch.randperm(37, generator=generator)
    assert torch.equal(sde.log_prob_mean(x_next[order], mean[order], std[order]), whole[order])
    parts = [sde.log_prob_mean(x_next[i : i + 5], mean[i : i + 5], std[i : i + 5]) for i in range(0, 37, 5)]
    assert torch.equal(torch.cat(parts), whole)


def test_log_prob_of_a_large_latent_does_not_depend_on_batch_size_or_threads(generator):
    x_next, mean = (torch.randn(4, 16, 64, 64, generator=generator) for _ in range(2))
    threads = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            parts = [sde.log_prob_mean(x_next[i : i + 1], mean[i : i + 1], 0.3) for i in range(4)]
            results.append(sde.log_prob_mean(x_next, mean, 0.3))
            assert torch.equal(torch.cat(parts), results[-1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", sde.KINDS)
def test_half_precision_and_float64_inputs_are_computed_in_float32(kind, batch: Pair):
    x, velocity = (part.bfloat16() for part in batch)
    expected = reverse_step(kind, x.float(), velocity.float(), 0.8, 0.6, 0.7, 0.9)
    for dtype in (torch.bfloat16, torch.float64):
        stats = reverse_step(
            kind, x.to(dtype), velocity.to(dtype), torch.tensor(0.8, dtype=torch.float64), 0.6, 0.7, 0.9
        )
        assert stats.mean.dtype == stats.std.dtype == torch.float32
        assert torch.equal(stats.mean, expected.mean) and torch.equal(stats.std, expected.std)


@pytest.mark.parametrize("kind", sde.KINDS)
def test_gradient_reaches_the_velocity(kind, batch: Pair):
    velocity = batch[1].clone().requires_grad_()
    reverse_step(kind, batch[0], velocity, 0.8, 0.6, 0.7, 0.9).mean.sum().backward()
    assert velocity.grad is not None and (velocity.grad < 0).all()


def test_bad_steps_are_refused(batch: Pair):
    with pytest.raises(ValueError, match="known: ode, flow, dance, cps, ddpm"):
        reverse_step("euler", *batch, 0.8, 0.6, 0.7)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="sigma_max"):
        reverse_step("flow", *batch, 0.8, 0.6, 0.7)
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        reverse_step("cps", *batch, 0.8, 0.6, 1.2)
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        reverse_step("ddpm", *batch, 0.8, 0.6, 1.2)
    for noise_level in (-0.1, math.nan):
        with pytest.raises(ValueError, match="noise_level"):
            reverse_step("dance", *batch, 0.8, 0.6, noise_level)
