"""The normalised log-ratio of GRPO-Guard against Gaussians."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal

from flowalign.flow import sde

STDS = (0.05, 0.4, 1.7)
COUNT, SHAPE = 4000, (4, 4, 4)


@pytest.fixture
def steps(generator):
    """The same noise and the same change of the mean at steps of different std: log-ratios of each, (N,) by std."""
    noise = torch.randn(COUNT, *SHAPE, generator=generator)
    change = 0.03 * torch.randn(1, *SHAPE, generator=generator)
    old_mean = torch.randn(COUNT, *SHAPE, generator=generator)
    plain, normalised = {}, {}
    for std in STDS:
        x_next, mean = old_mean + std * noise, old_mean + change
        new, old = (Normal(m, std).log_prob(x_next).mean((1, 2, 3)) for m in (mean, old_mean))
        plain[std] = new - old
        normalised[std] = sde.normalised_log_ratio(plain[std], mean, old_mean, std)
    return noise, change, plain, normalised


def test_it_is_the_noise_times_the_change_of_the_mean_whatever_the_std(steps):
    noise, change, _, normalised = steps
    for std in STDS:
        torch.testing.assert_close(normalised[std], (noise * change).mean((1, 2, 3)), rtol=1e-3, atol=1e-5)


def test_its_spread_is_equal_at_every_step_while_the_plain_one_grows_as_1_over_std(steps):
    _, change, plain, normalised = steps
    dimensions = change.numel()
    spread = change.norm() / dimensions
    for std in STDS:
        torch.testing.assert_close(normalised[std].std(), spread, rtol=0.05, atol=0)
        torch.testing.assert_close(plain[std].std(), spread / std, rtol=0.05, atol=0)


def test_its_mean_is_0_where_the_plain_one_is_shifted_below(steps):
    _, change, plain, normalised = steps
    for std in STDS:
        sampling_error = float(normalised[std].std()) / COUNT**0.5
        assert abs(float(normalised[std].mean())) < 4 * sampling_error
        bias = -float(change.square().mean()) / (2 * std**2)
        assert abs(float(plain[std].mean()) - bias) < 4 * sampling_error / std
    assert float(plain[0.05].mean()) < -0.1


def test_it_is_exactly_0_for_an_unchanged_policy():
    mean = torch.randn(3, *SHAPE)
    assert torch.equal(sde.normalised_log_ratio(torch.zeros(3), mean, mean, torch.rand(3) + 0.1), torch.zeros(3))


def test_every_form_of_std_gives_the_same_result(steps):
    noise, change, plain, _ = steps
    log_ratio, old_mean = plain[0.4][:3], noise[:3]
    expected = sde.normalised_log_ratio(log_ratio, old_mean + change, old_mean, 0.4)
    for std in (torch.tensor(0.4), torch.full((3,), 0.4), torch.full((3, 1, 1, 1), 0.4)):
        assert torch.equal(sde.normalised_log_ratio(log_ratio, old_mean + change, old_mean, std), expected)
