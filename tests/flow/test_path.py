from __future__ import annotations

import pytest
import torch

from flowalign.flow import path
from flowalign.flow.path import PATHS, RF, Path
from tests.flow import analytic

Pair = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def pair(generator) -> Pair:
    x0 = torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64)
    return x0, torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64)


T = torch.tensor([0.1, 0.5, 0.95], dtype=torch.float64)


def test_path_starts_at_data_and_ends_at_noise(pair: Pair):
    x0, noise = pair
    assert torch.equal(path.interpolate(x0, noise, 0.0), x0)
    assert torch.equal(path.interpolate(x0, noise, 1.0), noise)


def test_velocity_is_the_time_derivative_of_the_path(pair: Pair):
    x0, noise = pair
    slope = (path.interpolate(x0, noise, 0.6) - path.interpolate(x0, noise, 0.4)) / 0.2
    torch.testing.assert_close(slope, path.velocity_target(x0, noise))


def test_velocity_and_state_give_back_data_noise_and_score(pair: Pair):
    x0, noise = pair
    x, velocity = path.interpolate(x0, noise, T), path.velocity_target(x0, noise)
    torch.testing.assert_close(path.x0_from_velocity(x, velocity, T), x0)
    torch.testing.assert_close(path.noise_from_velocity(x, velocity, T), noise)
    torch.testing.assert_close(analytic.score(x, velocity, T), -noise / T.reshape(3, 1, 1, 1))


def test_score_of_gaussian_data_is_the_gradient_of_its_log_density(gaussian, generator):
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    t = T.reshape(3, 1)
    expected = -(x - gaussian.mean(t)) / gaussian.variance(t)
    torch.testing.assert_close(analytic.score(x, gaussian.velocity(x, T), T), expected)


@pytest.mark.parametrize("family", PATHS.values(), ids=PATHS)
def test_derivatives_of_every_family_match_finite_differences(family: Path):
    h, t = 1e-6, T + 3e-4  # away from the thousandths, where the linear schedule has its knots
    torch.testing.assert_close((family.a(t + h) - family.a(t - h)) / (2 * h), family.da(t), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close((family.b(t + h) - family.b(t - h)) / (2 * h), family.db(t), rtol=1e-7, atol=1e-7)


def test_family_rf_is_the_rectified_flow_of_the_free_functions(pair: Pair):
    x0, noise = pair
    torch.testing.assert_close(analytic.interpolate(RF, x0, noise, T), path.interpolate(x0, noise, T))
    assert bool((RF.da(T) == -1).all()) and bool((RF.db(T) == 1).all())


def test_log_snr_falls_from_data_to_noise():
    t = torch.linspace(0.01, 0.99, 99)
    for family in PATHS.values():
        assert (analytic.log_snr(family, t).diff() < 0).all()


def test_float_and_per_sample_times_agree_bitwise(pair: Pair):
    x0, noise = (part.float() for part in pair)
    assert torch.equal(path.interpolate(x0, noise, 0.3), path.interpolate(x0, noise, torch.full((3,), 0.3)))


def test_time_of_a_wrong_batch_is_refused(pair: Pair):
    with pytest.raises(ValueError, match=r"\(N,\)"):
        path.interpolate(*pair, torch.tensor([0.1, 0.2]))
