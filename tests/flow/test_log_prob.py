from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from flowalign.flow import sde

STD = torch.tensor([0.05, 0.4, 1.7])


@pytest.fixture
def states(generator):
    mean, noise, shift = (torch.randn(3, 4, 5, 5, generator=generator) for _ in range(3))
    return mean + STD.reshape(3, 1, 1, 1) * noise, mean, mean + 0.1 * shift


def test_log_prob_is_the_normal_density(states):
    x_next, mean, _ = states
    expected = Normal(mean, STD.reshape(3, 1, 1, 1)).log_prob(x_next)
    torch.testing.assert_close(sde.log_prob_mean(x_next, mean, STD), expected.mean((1, 2, 3)))


def test_unnormalised_log_prob_is_minus_the_mean_square(states):
    x_next, mean, _ = states
    expected = -((x_next - mean) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(sde.log_prob_mean_unnormalised(x_next, mean), expected)


def test_kl_is_the_normal_divergence_averaged_over_dimensions(states):
    _, mean, mean_ref = states
    std = STD.reshape(3, 1, 1, 1)
    expected = kl_divergence(Normal(mean, std), Normal(mean_ref, std)).mean((1, 2, 3))
    torch.testing.assert_close(sde.kl_mean(mean, mean_ref, STD), expected)
    assert torch.equal(sde.kl_mean(mean, mean, STD), torch.zeros(3))


def test_every_form_of_std_gives_the_same_result(states):
    x_next, mean, mean_ref = states
    for std in (torch.tensor(0.4), torch.full((3,), 0.4), torch.full((3, 1, 1, 1), 0.4)):
        assert torch.equal(sde.log_prob_mean(x_next, mean, std), sde.log_prob_mean(x_next, mean, 0.4))
        assert torch.equal(sde.kl_mean(mean, mean_ref, std), sde.kl_mean(mean, mean_ref, 0.4))


def test_gradient_of_the_mean_log_prob_is_the_scaled_residual(states):
    x_next, mean, _ = states
    mean = mean.clone().requires_grad_()
    sde.log_prob_mean(x_next, mean, STD).sum().backward()
    assert mean.grad is not None
    expected = (x_next - mean.detach()) / STD.reshape(3, 1, 1, 1) ** 2 / 100
    torch.testing.assert_close(mean.grad, expected)


def test_kl_has_a_gradient_to_the_policy(states):
    _, mean, mean_ref = states
    mean = mean.clone().requires_grad_()
    sde.kl_mean(mean, mean_ref, STD).sum().backward()
    assert mean.grad is not None and mean.grad.abs().sum() > 0
