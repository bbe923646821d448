"""Every algorithm moves the mass of a mixture of Gaussians to the rewarded mode; the figures of merit are exact."""

import pytest
import torch

from flowalign.types import LatentBatch
from tests.algorithms.cases import CASES
from tests.algorithms.every import every_algorithm
from tests.algorithms.mixture import MODES, STD, LabelledPairs, mass, mixture_policy, mixture_velocity, reward
from tests.flow import analytic


def test_the_velocity_is_the_one_of_the_mixtures_own_score():
    generator = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(50, 2, generator=generator, dtype=torch.float64)).requires_grad_()
    t = 0.05 + 0.9 * torch.rand(50, generator=generator, dtype=torch.float64)
    variance = ((1 - t) ** 2 * STD**2 + t**2)[:, None]
    apart = (x[:, None] - (1 - t)[:, None, None] * MODES).square().sum(-1)
    log_density = (-apart / (2 * variance)).logsumexp(1)
    score = torch.autograd.grad(log_density.sum(), x)[0]
    torch.testing.assert_close(analytic.score(x.detach(), mixture_velocity(x.detach(), t), t), score)


def test_the_base_makes_all_modes_alike_whatever_the_prompt():
    base = mixture_policy()
    assert [mass(base, 0, mode) for mode in range(3)] == [mass(base, 1, mode) for mode in range(3)]
    assert all(mass(base, 0, mode) == pytest.approx(1 / 3, abs=0.05) for mode in range(3))


def test_of_a_labelled_pair_the_winner_alone_is_near_the_mode_of_its_prompt():
    pairs = LabelledPairs((0, 2))
    modes = pairs.condition.expand()["pooled"].argmax(1).tolist()
    assert len(modes) > 200 and set(modes) == {0, 2}
    assert reward(pairs.winner_NCHW, modes).all() and not reward(pairs.loser_NCHW, modes).any()


def test_no_algorithm_is_left_out():
    aligns = {name for name, own in every_algorithm().items() if own.needs.batch is not LatentBatch}
    assert {str(case.config["type"]) for case in CASES.values()} == aligns


# By day one case of each algorithm, and what changes which steps are learned from.
BY_DAY = ("flow_grpo", "flow_grpo sliding", "flow_grpo g2rpo", "dpo online", "opd ode", "nft", "sft best", "awm")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in BY_DAY else pytest.mark.slow) for n in CASES])
def test_the_mass_moves_to_the_rewarded_mode_of_each_prompt(name):
    policy = CASES[name].run()
    assert all(mass(policy, prompt) > CASES[name].expected for prompt in CASES[name].prompts)
