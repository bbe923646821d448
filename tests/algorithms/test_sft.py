import math

import pytest
import torch
from pydantic import ValidationError

from flowalign.algorithms import build_algorithm
from flowalign.types import TrainBatch
from tests.algorithms.toy import ConstantVelocity, LinearVelocity, condition, make_rollout, make_scores
from tests.algorithms.whole import prepare

REWARDS = torch.tensor([0.0, 1.0, 0.5, 0.2, 0.1, 0.0, 0.0, 0.3])
GROUPS = (0,) * 4 + (1,) * 4
ALL = torch.ones(8, dtype=torch.bool)


def sft(**changes):
    return build_algorithm({"type": "sft", "group_size": 4, "num_steps": 6, "timesteps": 3, **changes})


def prepared(algorithm, models, rewards=REWARDS, valid=None):
    rollout = make_rollout(models["policy"], algorithm.plan(0, 0))
    with torch.no_grad():
        return prepare(algorithm, rollout, make_scores(rewards, valid), models)


def weights(algorithm, rewards=REWARDS, valid=ALL, sample_ids=tuple(range(8))):
    return algorithm.weights(rewards, valid, GROUPS, sample_ids)[0]


def gradients(output, model, coverage=1.0):
    return torch.autograd.grad(output.loss * coverage, list(model.parameters()))


def assert_close(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_the_loss_is_the_one_computed_by_hand():
    """v = (1, 2). Item 1: u = (2, 0), mean square 2.5, weight 3. Item 2: u = (1, 0), mean square 2, weight 0.5.

    loss = (3 · 2.5 + 0.5 · 2) / 2 = 4.25. Gradient: (3 (v - u_1) + 0.5 (v - u_2)) · 2 / 2 / 2
    = (3 (-1, 2) + 0.5 (0, 2)) / 2 = (-1.5, 3.5).
    """
    target = torch.tensor([[2.0, 0.0], [1.0, 0.0]]).reshape(2, 2, 1, 1)
    tensors = {"x": torch.zeros(2, 2, 1, 1), "t": torch.ones(2), "target": target, "weight": torch.tensor([3.0, 0.5])}
    policy = ConstantVelocity(1.0, 2.0)
    output = sft().loss({"policy": policy}, TrainBatch(tensors, condition(2)))
    assert output.loss.item() == pytest.approx(4.25)
    assert gradients(output, policy)[0].flatten().tolist() == pytest.approx([-1.5, 3.5])


def test_the_best_of_a_group_share_its_weight():
    assert weights(sft()).tolist() == [0, 4, 0, 0, 0, 0, 0, 4]
    assert weights(sft(best_of_group=2)).tolist() == [0, 2, 2, 0, 2, 0, 0, 2]


def test_of_equal_images_the_lowest_sample_id_is_better_in_whatever_order_they_come():
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    assert weights(sft(), rewards, sample_ids=(3, 1, 0, 2, 9, 8, 7, 6)).tolist() == [0, 4, 0, 0, 0, 0, 4, 0]


def test_reward_weights_are_a_softmax_over_the_group_of_mean_one():
    """softmax(0, τ ln 2, τ ln 2, τ ln 3 over τ) = (1, 2, 2, 3) / 8, times the four images of the group."""
    tau = 0.4
    rewards = torch.tensor([0.0, tau * math.log(2), tau * math.log(2), tau * math.log(3)] * 2)
    got = weights(sft(select="rwr", temperature=tau), rewards)
    torch.testing.assert_close(got, torch.tensor([0.5, 1.0, 1.0, 1.5] * 2))


@pytest.mark.parametrize("select", ["best", "rwr"])
def test_an_invalid_sample_has_no_weight_and_leaves_the_mean_of_the_others_at_one(select):
    rewards, valid = REWARDS.clone(), ALL.clone()
    rewards[1], valid[1] = float("nan"), False
    got = weights(sft(select=select), rewards, valid)
    assert got[1] == 0 and got[0:4].sum() == pytest.approx(3) and got[4:].sum() == pytest.approx(4)
    if select == "best":
        assert got[2] == 3


@pytest.mark.parametrize("select", ["best", "rwr"])
def test_equal_rewards_and_lone_samples_leave_nothing_to_prefer(select):
    model, algorithm = LinearVelocity(), sft(select=select)
    rewards, valid = torch.full((8,), 0.3), ALL.clone()
    valid[5:] = False
    train = prepared(algorithm, {"policy": model}, rewards, valid)
    assert len(train) == 0 and train.total == 5 * 3 and train.metrics["zero_std_fraction"] == 1


@pytest.mark.parametrize("select", ["best", "rwr"])
def test_dropping_images_without_weight_changes_no_gradient(select):
    """A KL of weight 1e-30 keeps every item and adds nothing."""
    models = {"policy": LinearVelocity(), "reference": LinearVelocity()}
    rewards = torch.tensor([0.0, 1.0, 0.5, 0.2, 0.7, 0.7, 0.7, 0.7])
    results = []
    for beta in (0.0, 1e-30):
        algorithm = sft(select=select, beta=beta)
        train = prepared(algorithm, models, rewards)
        output = algorithm.loss(models, train)
        results.append((len(train), gradients(output, models["policy"], len(train) / train.total)))
    assert [count for count, _ in results] == [3 if select == "best" else 12, 24]
    assert_close(results[0][1], results[1][1])


def test_the_gradient_is_that_of_pretraining_on_the_best_images_alone():
    model, algorithm = LinearVelocity(), sft()
    train = prepared(algorithm, {"policy": model})
    item = train.tensors
    mse = (model(item["x"], item["t"], None) - item["target"]).square().mean()
    expected = torch.autograd.grad(mse, list(model.parameters()))
    assert len(train) == 2 * 3
    assert_close(gradients(algorithm.loss({"policy": model}, train), model, len(train) / train.total), expected)


def test_kl_has_the_value_of_its_formula_and_a_gradient_for_the_policy_only():
    algorithm = sft(beta=2.0)
    models = {"policy": LinearVelocity(0), "reference": LinearVelocity(1)}
    train = prepared(algorithm, models, torch.full((8,), 0.3))
    output = algorithm.loss(models, train)
    ours, theirs = (models[role](train.tensors["x"], None, None) for role in ("policy", "reference"))
    kl = (ours - theirs.detach()).square().mean()
    torch.testing.assert_close(output.metrics["loss/kl"], kl.detach())
    expected = torch.autograd.grad(2.0 * kl, list(models["policy"].parameters()))
    assert_close(gradients(output, models["policy"]), expected)
    assert models["reference"].weight.grad is None


def test_selecting_the_whole_group_is_refused():
    with pytest.raises(ValidationError, match="best_of_group"):
        sft(best_of_group=4)
