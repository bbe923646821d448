import pytest
import torch

from flowalign.algorithms import build_algorithm
from flowalign.types import TrainBatch, value_of
from tests.algorithms.toy import ConstantVelocity, LinearVelocity, condition, make_rollout, make_scores
from tests.algorithms.whole import prepare

REWARDS = torch.tensor([0.0, 1.0, 0.5, 0.2, 1.0, 0.0, 0.0, 1.0])


def nft(**changes):
    return build_algorithm({"type": "nft", "group_size": 4, "num_steps": 6, "timesteps": 3, **changes})


def prepared(algorithm, models, rewards=REWARDS, valid=None):
    rollout = make_rollout(models["policy"], algorithm.plan(0, 0))
    with torch.no_grad():
        return prepare(algorithm, rollout, make_scores(rewards, valid), models)


def by_hand(*, r, old, target, t=1.0):
    """One item with latents of two elements."""
    tensors = {"optimality": torch.tensor([r]), "t": torch.tensor([t]), "x": torch.zeros(1, 2, 1, 1)}
    tensors |= {k: torch.tensor(v).reshape(1, 2, 1, 1) for k, v in (("old_velocity", old), ("target", target))}
    return TrainBatch(tensors, condition(1))


def gradients(output, model):
    return torch.autograd.grad(output.loss, list(model.parameters()))


def assert_close(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_the_loss_is_the_one_computed_by_hand():
    """v = (1, 2), v_old = (0, 1), u = (2, 0), β = 0.5, r = 0.75.

    v⁺ = (0.5, 1) + (0, 0.5) = (0.5, 1.5); v⁺ - u = (-1.5, 1.5), mean square (2.25 + 2.25) / 2 = 2.25.
    v⁻ = (0, 1.5) - (0.5, 1) = (-0.5, 0.5); v⁻ - u = (-2.5, 0.5), mean square (6.25 + 0.25) / 2 = 3.25.
    loss = 0.75 · 2.25 + 0.25 · 3.25 = 2.5.
    Gradient: r · 2β (v⁺ - u) / 2 - (1 - r) · 2β (v⁻ - u) / 2 = 0.375 (-1.5, 1.5) - 0.125 (-2.5, 0.5) = (-0.25, 0.5).
    """
    policy = ConstantVelocity(1.0, 2.0)
    batch = by_hand(r=0.75, old=(0.0, 1.0), target=(2.0, 0.0))
    output = nft(beta=0.5, weighting="uniform").loss({"policy": policy}, batch)
    assert output.loss.item() == pytest.approx(2.5)
    assert value_of(output.metrics["loss/velocity_mse"]).item() == pytest.approx(2.5)  # ((1 - 2)² + (2 - 0)²) / 2
    assert value_of(output.metrics["old/velocity_mse"]).item() == pytest.approx(1.0)
    assert gradients(output, policy)[0].flatten().tolist() == pytest.approx([-0.25, 0.5])


def test_adaptive_weights_divide_the_error_of_x0_by_its_mean_absolute_error():
    """The same at t = 0.5, where x̂_0 - x_0 = 0.5 (u - v).

    Positive: mean square 0.25 · 2.25, mean absolute 0.5 · 1.5: 0.5625 / 0.75 = 0.75.
    Negative: mean square 0.25 · 3.25, mean absolute 0.5 · (2.5 + 0.5) / 2: 0.8125 / 0.75 = 1.08333.
    loss = 0.75 · 0.75 + 0.25 · 1.08333 = 0.83333; the weights have no gradient, so each branch keeps its share:
    0.375 / 3 (-1.5, 1.5) - 0.125 / 3 (-2.5, 0.5) = (-0.08333, 0.16667), as 0.25 / 0.75 = 1/3 for both.
    """
    policy = ConstantVelocity(1.0, 2.0)
    batch = by_hand(r=0.75, old=(0.0, 1.0), target=(2.0, 0.0), t=0.5)
    output = nft(beta=0.5, weighting="adaptive").loss({"policy": policy}, batch)
    assert output.loss.item() == pytest.approx(0.75 * 0.75 + 0.25 * 0.8125 / 0.75)
    assert gradients(output, policy)[0].flatten().tolist() == pytest.approx([-0.25 / 3, 0.5 / 3])


def test_a_perfect_prediction_divides_nothing_by_zero():
    policy = ConstantVelocity(2.0, 0.0)
    output = nft().loss({"policy": policy}, by_hand(r=0.5, old=(2.0, 0.0), target=(2.0, 0.0)))
    assert output.loss.item() == 0 and bool((gradients(output, policy)[0] == 0).all())


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_on_policy_gradient_is_that_of_the_flow_matching_loss_times_beta_2r_minus_1(beta):
    """At v = v_old both branches have the error v - u, and ∂v⁺ = β ∂v = -∂v⁻: β (2r - 1) · 2 (v - u) ∂v / d."""
    model, algorithm = LinearVelocity(), nft(beta=beta, weighting="uniform", rollout_weights="model")
    train = prepared(algorithm, {"policy": model, "rollout": model})
    got = gradients(algorithm.loss({"policy": model}, train), model)
    item = train.tensors
    velocity = model(item["x"], item["t"], None)
    factor = beta * (2 * item["optimality"] - 1)[:, None, None, None]
    direction = factor * 2 * (velocity - item["target"]).detach() / velocity.numel()
    expected = torch.autograd.grad(velocity, list(model.parameters()), grad_outputs=direction)
    assert any(bool((g != 0).any()) for g in expected)
    assert_close(got, expected)


def test_the_loss_is_the_old_error_plus_an_advantage_term_plus_a_square_around_the_old_policy():
    """With d = v - v_old and e = v_old - u: |e|² + 2β (2r - 1) e·d + β² |d|², means over the elements."""
    algorithm, models = nft(beta=0.7, weighting="uniform"), {"policy": LinearVelocity(0), "rollout": LinearVelocity(1)}
    train = prepared(algorithm, models)
    item = train.tensors
    d = models["policy"](item["x"], item["t"], None) - item["old_velocity"]
    e = item["old_velocity"] - item["target"]
    slope = (2 * item["optimality"] - 1)[:, None, None, None]
    expected = (e.square() + 2 * 0.7 * slope * e * d + 0.7**2 * d.square()).mean()
    torch.testing.assert_close(algorithm.loss(models, train).loss, expected)


@pytest.mark.parametrize("weighting", ["uniform", "adaptive"])
def test_equal_rewards_give_exactly_zero_gradient_on_policy(weighting):
    model, algorithm = LinearVelocity(), nft(weighting=weighting, rollout_weights="model")
    train = prepared(algorithm, {"policy": model, "rollout": model}, torch.full((8,), 0.3))
    assert train.metrics["zero_std_fraction"] == 1 and len(train) == 24
    assert all(bool((g == 0).all()) for g in gradients(algorithm.loss({"policy": model}, train), model))


def test_equal_rewards_pull_a_policy_that_has_moved_back_to_the_old_one():
    """At r = 1/2 what remains is β² |v - v_old|²: no image is dropped, however silent its group."""
    algorithm, models = nft(beta=0.5, weighting="uniform"), {"policy": LinearVelocity(0), "rollout": LinearVelocity(1)}
    train = prepared(algorithm, models, torch.full((8,), 0.3))
    got = gradients(algorithm.loss(models, train), models["policy"])
    item = train.tensors
    square = (models["policy"](item["x"], item["t"], None) - item["old_velocity"]).square().mean()
    assert_close(got, torch.autograd.grad(0.25 * square, list(models["policy"].parameters())))


def test_optimality_is_a_half_plus_half_the_advantage_over_its_limit():
    """std none: A = R - mean = (-0.5, 0.5) in each pair of groups; over the limit 0.4 both are clipped."""
    model = LinearVelocity()
    for limit, expected in ((1.0, [0.25, 0.75]), (0.4, [0.0, 1.0])):
        algorithm = nft(std="none", advantage_clip=limit)
        train = prepared(algorithm, {"policy": model, "rollout": model}, torch.tensor([0.0, 0.0, 1.0, 1.0] * 2))
        assert train.tensors["optimality"].unique().tolist() == pytest.approx(expected)


def test_the_old_velocity_is_that_of_the_weights_that_rolled_out():
    algorithm, models = nft(), {"policy": LinearVelocity(0), "rollout": LinearVelocity(1)}
    item = prepared(algorithm, models).tensors
    assert torch.equal(item["old_velocity"], models["rollout"](item["x"], item["t"], None).detach())
    assert not item["old_velocity"].requires_grad


def test_an_invalid_sample_reaches_no_loss():
    model, algorithm = LinearVelocity(), nft()
    rewards = REWARDS.clone()
    rewards[2] = float("nan")
    train = prepared(algorithm, {"policy": model, "rollout": model}, rewards, torch.isfinite(rewards))
    assert len(train) == train.total == 7 * 3
    assert torch.isfinite(algorithm.loss({"policy": model}, train).loss)


def test_kl_is_the_velocitys_square_distance_to_the_reference_with_a_gradient_for_the_policy_only():
    algorithm = nft(kl_beta=2.0, rollout_weights="model")
    models = {"policy": LinearVelocity(0), "rollout": LinearVelocity(0), "reference": LinearVelocity(1)}
    assert algorithm.needs.roles == ("policy", "rollout", "reference")
    train = prepared(algorithm, models, torch.full((8,), 0.3))  # no advantage: the KL alone has a gradient
    output = algorithm.loss(models, train)
    ours, theirs = (models[role](train.tensors["x"], None, None) for role in ("policy", "reference"))
    kl = (ours - theirs.detach()).square().mean()
    torch.testing.assert_close(output.metrics["loss/kl"], kl.detach())
    parameters = list(models["policy"].parameters())
    assert_close(gradients(output, models["policy"]), torch.autograd.grad(2.0 * kl, parameters))
    assert models["reference"].weight.grad is None


def test_beta_must_be_positive_because_zero_would_learn_nothing():
    with pytest.raises(ValueError, match="beta"):
        nft(beta=0.0)
