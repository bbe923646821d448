"""Where all images are rewarded alike there is nothing to learn, for every algorithm that learns from rewards.

Most drop such images. A KL keeps them, since it has something to say about every image; and so does NFT, whose loss
at r = 1/2 is ``beta² |v - v_old|²``: zero with its gradient while the policy is the one that rolled out, a pull back to
the average once it has moved away.
"""

import pytest
import torch

from flowalign.algorithms import build_algorithm
from tests.algorithms.cases import CASES
from tests.algorithms.mixture import MixtureRun
from tests.algorithms.toy import make_scores

REWARDED = [name for name, case in CASES.items() if build_algorithm(case.config).needs.scores]
KEEPS = [name for name in REWARDED if CASES[name].config["type"] == "nft" or CASES[name].config.get("beta", 0) == 0.02]


def learn_from_equal_rewards(run: MixtureRun, iteration: int) -> tuple[bool, dict[str, float]]:
    """Whether any weight changed, and the metrics."""
    made, before = run.rollout(iteration), run.learner.engine.weights()
    update = run.learner.update(made, make_scores(torch.full((len(made),), 0.5)), iteration)
    after = run.learner.engine.weights()
    return any(not torch.equal(before[name], after[name]) for name in before), dict(update.metrics)


@pytest.mark.parametrize("name", REWARDED)
def test_equal_rewards_give_exactly_zero_gradient_and_move_no_weight(name):
    moved, metrics = learn_from_equal_rewards(CASES[name].build(groups=2, updates_per_iteration=1, epochs=1), 0)
    assert not moved and metrics.get("grad_norm", 0.0) == 0
    assert (metrics["learner/updates"] > 0) == (name in KEEPS)


@pytest.mark.parametrize("name", REWARDED)
def test_once_the_policy_has_moved_equal_rewards_teach_only_what_holds_it_to_another_policy(name):
    run = CASES[name].build(groups=8, updates_per_iteration=1, epochs=1)
    run.step(0)
    moved, metrics = learn_from_equal_rewards(run, 1)
    assert moved == (name in KEEPS)
    if name in KEEPS:  # on-policy NFT has gradient 0 as well, and moves by Adam's momentum alone
        assert (metrics["grad_norm"] > 0) == (name != "nft on-policy")
