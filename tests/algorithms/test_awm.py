import math

import pytest
import torch
from pydantic import ValidationError

from flowalign.algorithm import Reference
from flowalign.algorithms import build_algorithm
from flowalign.algorithms.awm import AWM
from flowalign.algorithms.parts.credit import group_advantages
from flowalign.types import TrainBatch, value_of
from tests.algorithms.toy import ConstantVelocity, LinearVelocity, condition, make_rollout, make_scores
from tests.algorithms.whole import prepare

REWARDS = torch.tensor([0.0, 1.0, 0.5, 0.2, 1.0, 0.0, 0.0, 1.0])
WEIGHTINGS = ("uniform", "t", "ghuber")


def awm(**changes) -> AWM:
    return AWM(AWM.Config.model_validate({"type": "awm", "group_size": 4, "num_steps": 6, "timesteps": 3, **changes}))


def prepared(algorithm, models, rewards=REWARDS, valid=None):
    rollout = make_rollout(models["policy"], algorithm.plan(0, 0))
    with torch.no_grad():
        return prepare(algorithm, rollout, make_scores(rewards, valid), models)


def by_hand(*, target, t=1.0, **numbers):
    """One item with latents of two elements."""
    tensors = {"x": torch.zeros(1, 2, 1, 1), "target": torch.tensor(target).reshape(1, 2, 1, 1)}
    tensors |= {key: torch.tensor([value]) for key, value in {"t": t, **numbers}.items()}
    return TrainBatch(tensors, condition(1))


def gradients(output, model, coverage=1.0):
    return torch.autograd.grad(output.loss * coverage, list(model.parameters()))


def assert_close(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [("uniform", -16.0), ("t", -8.0), ("ghuber", -0.5 * 4 * (2.0 - 1e-10**0.25))],
)
def test_the_log_prob_is_the_one_computed_by_hand(weighting, expected):
    """v = (1, 2), u = (-3, -2): mean square (16 + 16) / 2 = 16, whose fourth root is 2; t = 0.5, and 1 / 0.25 = 4."""
    batch = by_hand(target=(-3.0, -2.0), t=0.5)
    velocity = ConstantVelocity(1.0, 2.0)(batch.tensors["x"], None, None)
    assert awm(weighting=weighting).log_prob(velocity, batch.tensors).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("advantage", "expected"), [(2.0, -2.2), (-2.0, 2.4)])
def test_the_clipped_loss_is_the_one_computed_by_hand(advantage, expected):
    """v = (1, 2), u = (2, 0): log p = -(1 + 4) / 2 = -2.5. Old log p = -2.5 - ln 1.2: the ratio is 1.2, clipped to 1.1.

    A = 2: max(-2.4, -2.2) = -2.2. A = -2: max(2.4, 2.2) = 2.4.
    """
    batch = by_hand(target=(2.0, 0.0), old_log_prob=-2.5 - math.log(1.2), advantage=advantage)
    output = awm(weighting="uniform", clip_range=0.1).loss({"policy": ConstantVelocity(1.0, 2.0)}, batch)
    assert output.loss.item() == pytest.approx(expected)
    assert value_of(output.metrics["ratio/mean"]) == pytest.approx(1.2)
    assert value_of(output.metrics["ratio/clip_fraction"]) == 1


def test_without_a_clip_range_the_loss_is_minus_the_advantage_times_the_log_prob():
    """A = 2, log p = -2.5: loss 5. Its gradient is 2 · 2 (v - u) / 2 = (-2, 4)."""
    policy, algorithm = ConstantVelocity(1.0, 2.0), awm(weighting="uniform", clip_range=None)
    output = algorithm.loss({"policy": policy}, by_hand(target=(2.0, 0.0), advantage=2.0))
    assert output.loss.item() == pytest.approx(5.0)
    assert gradients(output, policy)[0].flatten().tolist() == pytest.approx([-2.0, 4.0])
    assert algorithm.needs.roles == ("policy",)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_on_policy_both_forms_have_the_gradient_of_the_advantage_weighted_matching_loss(weighting):
    model = LinearVelocity()
    clipped, plain = (awm(weighting=weighting, clip_range=c) for c in (0.1, None))
    train = prepared(clipped, {"policy": model, "rollout": model})
    item = train.tensors
    error = (model(item["x"], item["t"], None) - item["target"]).square().flatten(1).mean(1)
    if weighting == "ghuber":
        error = 4 * ((error + 1e-10) ** 0.25)
    weight = item["advantage"] if weighting == "uniform" else item["advantage"] * item["t"]
    expected = torch.autograd.grad((weight * error).mean(), list(model.parameters()))
    for algorithm in (clipped, plain):
        assert_close(gradients(algorithm.loss({"policy": model}, train), model), expected)


def test_replay_on_the_rollout_weights_is_exact():
    model, algorithm = LinearVelocity(), awm()
    output = algorithm.loss({"policy": model}, prepared(algorithm, {"policy": model, "rollout": model}))
    assert value_of(output.metrics["replay/max_abs_dlogp"]) == 0
    assert value_of(output.metrics["ratio/mean"]) == 1


def test_rollouts_of_an_average_are_another_policys_and_no_replay():
    algorithm, models = awm(rollout_weights="ema"), {"policy": LinearVelocity(0), "rollout": LinearVelocity(1)}
    output = algorithm.loss(models, prepared(algorithm, models))
    assert "replay/max_abs_dlogp" not in output.metrics and value_of(output.metrics["ratio/mean"]) != 1


def test_equal_rewards_leave_nothing_to_learn():
    model, algorithm = LinearVelocity(), awm()
    train = prepared(algorithm, {"policy": model, "rollout": model}, torch.full((8,), 0.3))
    assert len(train) == 0 and train.total == 24 and train.metrics["zero_std_fraction"] == 1


def test_equal_rewards_give_zero_gradient_even_where_the_group_is_kept():
    """With β > 0 the points stay for the KL, which is 0 at the reference: so is its gradient."""
    model, algorithm = LinearVelocity(), awm(beta=0.5)
    models = {"policy": model, "rollout": model, "reference": LinearVelocity()}
    train = prepared(algorithm, models, torch.full((8,), 0.3))
    assert len(train) == train.total == 24
    assert all(bool((g == 0).all()) for g in gradients(algorithm.loss(models, train), model))


def test_dropping_silent_groups_changes_no_gradient():
    """A KL of weight 1e-30 keeps every item and adds nothing."""
    model = LinearVelocity()
    models = {"policy": model, "rollout": model, "reference": LinearVelocity()}
    rewards = torch.tensor([0.0, 1.0, 0.5, 0.2, 0.7, 0.7, 0.7, 0.7])
    results = []
    for beta in (0.0, 1e-30):
        algorithm = awm(beta=beta)
        train = prepared(algorithm, models, rewards)
        results.append((len(train), gradients(algorithm.loss(models, train), model, len(train) / train.total)))
    assert [count for count, _ in results] == [12, 24]
    assert_close(results[0][1], results[1][1])


def test_an_invalid_sample_reaches_no_loss_and_no_advantage():
    model, algorithm = LinearVelocity(), awm(beta=0.1)
    models = {"policy": model, "rollout": model, "reference": LinearVelocity(1)}
    rewards = REWARDS.clone()
    rewards[2] = float("nan")
    valid = torch.isfinite(rewards)
    train = prepared(algorithm, models, rewards, valid)
    assert len(train) == train.total == 7 * 3
    credit = group_advantages(rewards, valid, (0,) * 4 + (1,) * 4, std="batch").values[valid]
    assert torch.equal(train.tensors["advantage"], credit.repeat_interleave(3))
    assert torch.isfinite(algorithm.loss(models, train).loss)


def test_kl_has_the_value_of_its_formula_and_a_gradient_for_the_policy_only():
    algorithm = awm(beta=2.0)
    models = {"policy": LinearVelocity(0), "rollout": LinearVelocity(0), "reference": LinearVelocity(1)}
    train = prepared(algorithm, models, torch.full((8,), 0.3))
    output = algorithm.loss(models, train)
    ours, theirs = (models[role](train.tensors["x"], None, None) for role in ("policy", "reference"))
    kl = (ours - theirs.detach()).square().mean()
    torch.testing.assert_close(output.metrics["loss/kl"], kl.detach())
    expected = torch.autograd.grad(2.0 * kl, list(models["policy"].parameters()))
    assert_close(gradients(output, models["policy"]), expected)
    assert models["reference"].weight.grad is None


def test_the_smallest_error_has_a_finite_gradient():
    """The power 0.25 has none at 0; the small constant inside it keeps the gradient finite."""
    policy = ConstantVelocity(1.0, 2.0)
    batch = by_hand(target=(1.0, 2.0), advantage=1.0)
    output = awm(weighting="ghuber", clip_range=None).loss({"policy": policy}, batch)
    assert output.loss.item() == pytest.approx(0, abs=1e-6) and bool((gradients(output, policy)[0] == 0).all())


def test_a_reference_that_follows_the_policy_needs_a_kl():
    refreshed = build_algorithm({"type": "awm", "beta": 1.0, "reference_refresh": 4})
    assert refreshed.needs.reference == Reference(refresh=4)
    with pytest.raises(ValidationError, match="without a KL there is no reference"):
        build_algorithm({"type": "awm", "reference_refresh": 4})
