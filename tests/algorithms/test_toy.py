"""Every algorithm moves the mass of a mixture of Gaussians to the rewarded mode; the figures of merit are exact."""

import pytest
import torch

from flowalign.flow import path
from tests.algorithms.toy import MODES, STD, MixturePolicy, mass, mixture_velocity, train

FORWARD = {"group_size": 16, "num_steps": 10, "timesteps": 4}
# Algorithm, iterations, options of the run, and the mass that must have moved; fine-tuning on own samples keeps their
# discretisation error, so some of its mass stays beside the mode.
CASES = {
    "flow_grpo": ({"type": "flow_grpo", "group_size": 16, "num_steps": 10, "clip_range": 1e-2}, 60, {}, 0.9),
    "nft": ({"type": "nft", **FORWARD}, 80, {"ema_decay": 0.5}, 0.9),
    "nft uniform": ({"type": "nft", **FORWARD, "weighting": "uniform"}, 80, {"ema_decay": 0.5}, 0.9),
    "nft on-policy": ({"type": "nft", **FORWARD, "rollout_weights": "policy"}, 80, {}, 0.9),
    "sft best": ({"type": "sft", **FORWARD, "num_steps": 20}, 80, {"learning_rate": 1e-3}, 0.8),
    "sft rwr": ({"type": "sft", **FORWARD, "num_steps": 20, "select": "rwr"}, 80, {"learning_rate": 1e-3}, 0.8),
    "awm": ({"type": "awm", **FORWARD}, 80, {}, 0.9),
    "awm plain": ({"type": "awm", **FORWARD, "clip_range": None}, 80, {}, 0.9),
}


def test_the_velocity_is_the_one_of_the_mixtures_own_score():
    generator = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(50, 2, generator=generator, dtype=torch.float64)).requires_grad_()
    t = 0.05 + 0.9 * torch.rand(50, generator=generator, dtype=torch.float64)
    variance = ((1 - t) ** 2 * STD**2 + t**2)[:, None]
    apart = (x[:, None] - (1 - t)[:, None, None] * MODES).square().sum(-1)
    log_density = (-apart / (2 * variance)).logsumexp(1)
    score = torch.autograd.grad(log_density.sum(), x)[0]
    torch.testing.assert_close(path.score_from_velocity(x.detach(), mixture_velocity(x.detach(), t), t), score)


def test_the_base_makes_all_modes_alike_whatever_the_prompt():
    base = MixturePolicy()
    assert [mass(base, 0, mode) for mode in range(3)] == [mass(base, 1, mode) for mode in range(3)]
    assert all(mass(base, 0, mode) == pytest.approx(1 / 3, abs=0.05) for mode in range(3))


@pytest.mark.parametrize("name", CASES)
def test_the_mass_moves_to_the_rewarded_mode(name):
    config, iterations, options, expected = CASES[name]
    assert mass(train(config, iterations, **options), 0) > expected


def test_one_policy_learns_what_each_prompt_asks_for():
    policy = train({"type": "nft", **FORWARD}, 100, prompts=(0, 1), ema_decay=0.5)
    assert mass(policy, 0) > 0.9 and mass(policy, 1) > 0.9
