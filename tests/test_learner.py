"""The learner over a real engine: micro-batches, updates, what an empty batch does."""

import pytest
import torch

from flowalign.algorithm import build_algorithm
from flowalign.engine import EngineSettings, build_engine
from flowalign.learner import Learner
from tests.algorithms.toy import LinearVelocity, make_rollout, make_scores


def learner(model, *, seed=0, **changes):
    algorithm = build_algorithm({"type": "flow_grpo", "num_steps": 6, "noise_level": 0.6, "group_size": 4})
    engine = build_engine(model, EngineSettings(type="torch", learning_rate=1e-2))
    return Learner(algorithm, {"policy": model}, engine, **{"micro_batch_size": 8, "seed": seed, **changes})


def batch(model):
    algorithm = build_algorithm({"type": "flow_grpo", "num_steps": 6, "noise_level": 0.6, "group_size": 4})
    rollout = make_rollout(model, algorithm.rollout_plan(0, 0))
    return rollout, make_scores(torch.tensor([0.0, 1.0, 0.5, 0.2, 1.0, 0.0, 0.0, 1.0]))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_micro_batch_size_changes_no_update(size):
    results = []
    for micro in (8, size):
        model = LinearVelocity()
        own = learner(model, micro_batch_size=micro)
        metrics = own.update(*batch(LinearVelocity()), iteration=0).metrics
        results.append((own.weights(), metrics))
    for name, value in results[0][0].items():
        torch.testing.assert_close(value, results[1][0][name], rtol=1e-4, atol=1e-6)
    assert results[0][1]["ratio/mean"] == pytest.approx(1) == results[1][1]["ratio/mean"]


def test_replay_is_measured_before_the_first_step_moved_the_weights():
    model = LinearVelocity()
    update = learner(model, updates_per_iteration=4).update(*batch(model), iteration=0)
    assert update.metrics["replay/max_abs_dlogp"] == 0
    assert update.metrics["learner/updates"] == 4
    assert update.metrics["ratio/mean"] != 1


def test_a_batch_without_credit_moves_nothing_and_says_so():
    model = LinearVelocity()
    own = learner(model)
    before = own.weights()
    rollout, _ = batch(model)
    update = own.update(rollout, make_scores(torch.full((8,), 0.5)), iteration=0)
    assert update.metrics["learner/updates"] == 0 and update.version == 1
    assert all(torch.equal(before[k], v) for k, v in own.weights().items())


def test_an_update_is_a_function_of_seed_and_iteration():
    def weights(seed, iteration):
        model = LinearVelocity()
        own = learner(model, seed=seed, updates_per_iteration=3)
        own.update(*batch(LinearVelocity()), iteration=iteration)
        return own.weights()["weight"]

    assert torch.equal(weights(0, 0), weights(0, 0))
    assert not torch.equal(weights(0, 0), weights(0, 1))


def test_updates_raise_the_reward_of_a_toy():
    """Reward: the first latent's mean. Thirty on-policy updates must raise it."""
    model = LinearVelocity()
    own = learner(model)
    means = []
    for iteration in range(30):
        spec = own.algorithm.rollout_plan(iteration, 0)
        rollout = make_rollout(model, spec, groups=4, size=8, seed=iteration)
        reward = rollout.final_NCHW.flatten(1).mean(1)
        means.append(float(reward.mean()))
        own.update(rollout, make_scores(reward), iteration)
    assert sum(means[-5:]) / 5 > sum(means[:5]) / 5 + 0.1
