import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from flowalign.algorithm import Reference
from flowalign.algorithms import build_algorithm
from flowalign.algorithms.parts.pairs import best_worst_pairs
from flowalign.types import PreferencePairs, PromptBatch, Trajectories, value_of
from tests.algorithms.every import plan_of
from tests.algorithms.toy import SHAPE, LinearVelocity, condition, make_scores
from tests.algorithms.whole import prepare

DIMENSIONS = math.prod(SHAPE)


def dpo(**changes):
    return build_algorithm({"type": "diffusion_dpo", "source": "offline", **changes})


def pairs(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    winner, loser = torch.randn(2, count, *SHAPE, generator=generator)
    return PreferencePairs(winner, loser, condition(count), seed)


def swapped(batch):
    return replace(batch, winner_NCHW=batch.loser_NCHW, loser_NCHW=batch.winner_NCHW)


def rollout_of(final, groups, version=0):
    """A rollout of which only the final latents matter."""
    count = len(final)
    ids = tuple(range(count))
    online = build_algorithm({"type": "diffusion_dpo", "group_size": 4})
    return Trajectories(
        batch=PromptBatch(("p",) * count, tuple(groups), ids, ({},) * count),
        condition=condition(count),
        plan=plan_of(online),
        states_NSCHW=final.new_zeros(count, 0, *SHAPE),
        log_prob_NS=final.new_zeros(count, 0),
        final_NCHW=final,
        seed=7,
        policy_version=version,
    )


def gradients(algorithm, models, train):
    return torch.autograd.grad(algorithm.loss(models, train).loss, list(models["policy"].parameters()))


def error_gradients(model, x0, train):
    """By hand, of e = mean_d (w x + b - u)²: 2/d (v - u) x for w and 2/d (v - u) for b; a row a pair."""
    noise, t = train.tensors["noise"], train.tensors["t"].view(-1, 1, 1, 1)
    x = (1 - t) * x0 + t * noise
    residual = (model.weight * x + model.bias - (noise - x0)).detach()
    return 2 / DIMENSIONS * residual * x, 2 / DIMENSIONS * residual


def test_policy_equal_to_the_reference_gives_log_2():
    algorithm, models = dpo(), {"policy": LinearVelocity(), "reference": LinearVelocity()}
    output = algorithm.loss(models, prepare(algorithm, pairs(), None, models))
    assert float(output.loss.detach()) == pytest.approx(math.log(2), abs=1e-7)
    assert output.metrics["dpo/margin"] == 0 and output.metrics["dpo/implicit_accuracy"] == 0


@pytest.mark.parametrize("weighting", ["constant", "noise"])
@pytest.mark.parametrize("winner_weight", [1.0, 1.5])
def test_the_gradient_at_the_reference_is_beta_over_four_times_that_of_the_error_difference(weighting, winner_weight):
    """-log σ has slope -1/2 at 0, and the margin's is -β/2 · ω · (∇e_w - ∇e_l)."""
    algorithm = dpo(beta=40.0, weighting=weighting, winner_weight=winner_weight)
    models = {"policy": LinearVelocity(), "reference": LinearVelocity()}
    batch = pairs()
    train = prepare(algorithm, batch, None, models)
    omega = (1 - train.tensors["t"]).square().view(-1, 1, 1, 1) if weighting == "noise" else 1.0
    winner, loser = (error_gradients(models["policy"], x0, train) for x0 in (batch.winner_NCHW, batch.loser_NCHW))
    expected = [(40 / 4 * omega * (winner_weight * a - b)).mean(0) for a, b in zip(winner, loser, strict=True)]
    for got, hand in zip(gradients(algorithm, models, train), expected, strict=True):
        torch.testing.assert_close(got, hand, rtol=1e-4, atol=1e-6)


def test_away_from_the_reference_each_pair_counts_by_the_probability_it_is_wrong_with():
    algorithm = dpo(beta=5.0)
    models = {"policy": LinearVelocity(0), "reference": LinearVelocity(1)}
    batch = pairs()
    train = prepare(algorithm, batch, None, models)
    errors = {}
    for role, model in models.items():
        for image, x0 in (("w", batch.winner_NCHW), ("l", batch.loser_NCHW)):
            t, noise = train.tensors["t"].view(-1, 1, 1, 1), train.tensors["noise"]
            v = model.weight * ((1 - t) * x0 + t * noise) + model.bias
            errors[role, image] = (v - (noise - x0)).square().flatten(1).mean(1).detach()
    gap = errors["policy", "w"] - errors["reference", "w"] - errors["policy", "l"] + errors["reference", "l"]
    output = algorithm.loss(models, train)
    torch.testing.assert_close(output.loss.detach(), (1 + (2.5 * gap).exp()).log().mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.metrics["dpo/implicit_accuracy"], (gap < 0).float().mean())
    wrong = torch.sigmoid(2.5 * gap).view(-1, 1, 1, 1)
    winner, loser = (error_gradients(models["policy"], x0, train) for x0 in (batch.winner_NCHW, batch.loser_NCHW))
    expected = [(2.5 * wrong * (a - b)).mean(0) for a, b in zip(winner, loser, strict=True)]
    for got, hand in zip(gradients(algorithm, models, train), expected, strict=True):
        torch.testing.assert_close(got, hand, rtol=1e-4, atol=1e-6)


def test_swapping_winner_and_loser_flips_the_gradient_and_the_margin():
    algorithm, batch = dpo(beta=50.0), pairs()
    models = {"policy": LinearVelocity(), "reference": LinearVelocity()}
    one, other = (gradients(algorithm, models, prepare(algorithm, b, None, models)) for b in (batch, swapped(batch)))
    assert any(bool((g != 0).any()) for g in one)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, -b)
    models["policy"] = LinearVelocity(3)
    margins = [
        value_of(algorithm.loss(models, prepare(algorithm, b, None, models)).metrics["dpo/margin"])
        for b in (batch, swapped(batch))
    ]
    assert margins[0] == -margins[1] != 0


def test_a_step_down_the_gradient_prefers_the_winners():
    algorithm = dpo(beta=50.0)
    models = {"policy": LinearVelocity(), "reference": LinearVelocity()}
    train = prepare(algorithm, pairs(), None, models)
    optimizer = torch.optim.SGD(models["policy"].parameters(), lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        algorithm.loss(models, train).loss.backward()
        optimizer.step()
    output = algorithm.loss(models, train)
    assert value_of(output.metrics["dpo/implicit_accuracy"]) > 0.8 and output.loss < math.log(2)


def test_winner_and_loser_share_time_and_noise_which_depend_on_seed_and_pair_alone():
    algorithm, models = dpo(), {}
    few, many = (prepare(algorithm, pairs(count), None, models).tensors for count in (3, 6))
    assert torch.equal(few["t"], many["t"][:3]) and torch.equal(few["noise"], many["noise"][:3])
    assert len(set(many["t"].tolist())) == 6
    other = prepare(algorithm, pairs(6, seed=1), None, models).tensors
    assert not torch.equal(other["t"], many["t"])


def test_a_pair_is_compared_at_as_many_points_as_asked_for():
    batch, models = pairs(4), {"policy": LinearVelocity(), "reference": LinearVelocity()}
    train = prepare(dpo(timesteps=3), batch, None, models)
    assert (len(train), train.total, train.metrics["dpo/pairs"]) == (12, 12, 4)
    assert torch.equal(train.tensors["winner"], batch.winner_NCHW.repeat_interleave(3, 0))
    assert torch.equal(train.tensors["loser"], batch.loser_NCHW.repeat_interleave(3, 0))
    assert len(set(train.tensors["t"].tolist())) == 12 and len(train.tensors["noise"].flatten(1).unique(dim=0)) == 12


@pytest.mark.parametrize(
    ("changes", "quartiles"), [({}, [0.34, 0.50, 0.66]), ({"density_shift": 3}, [0.60, 0.75, 0.86])]
)
def test_times_are_logit_normal_and_a_shift_makes_them_noisier(changes, quartiles):
    times = prepare(dpo(timesteps=500, **changes), pairs(8), None, {}).tensors["t"]
    found = torch.quantile(times, torch.tensor([0.25, 0.5, 0.75]))
    assert found.tolist() == pytest.approx(quartiles, abs=0.02)


def test_a_shift_moves_each_time_and_leaves_the_noises():
    plain, moved = (prepare(dpo(density_shift=s), pairs(8), None, {}).tensors for s in (1.0, 3.0))
    torch.testing.assert_close(moved["t"], 3 * plain["t"] / (1 + 2 * plain["t"]))
    assert torch.equal(moved["noise"], plain["noise"]) and torch.equal(
        plain["t"], prepare(dpo(), pairs(8), None, {}).tensors["t"]
    )
    with pytest.raises(ValidationError, match="density_shift"):
        dpo(density_shift=0)


def test_the_sft_weight_adds_the_winner_s_own_loss():
    models = {"policy": LinearVelocity(0), "reference": LinearVelocity(1)}
    plain, mixed = dpo(), dpo(sft_weight=0.3)
    train = prepare(plain, pairs(), None, models)
    output = mixed.loss(models, train)
    expected = plain.loss(models, train).loss + 0.3 * value_of(output.metrics["loss/winner"])
    torch.testing.assert_close(output.loss, expected)
    assert value_of(output.metrics["loss/winner"]) > 0


@pytest.mark.parametrize("size", [1, 4, 5])
def test_the_gradient_is_invariant_to_the_micro_batch_split(size):
    algorithm = dpo(beta=20.0)
    models = {"policy": LinearVelocity(0), "reference": LinearVelocity(1)}
    train = prepare(algorithm, pairs(), None, models)
    whole = gradients(algorithm, models, train)
    split = [torch.zeros_like(g) for g in whole]
    for part in torch.arange(len(train)).split(size):
        grads = gradients(algorithm, models, train.take(part))
        split = [a + g * len(part) / len(train) for a, g in zip(split, grads, strict=True)]
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_online_pairs_are_the_best_and_the_worst_of_each_group():
    algorithm = build_algorithm({"type": "diffusion_dpo", "group_size": 4})
    final = torch.arange(12.0).view(12, 1, 1, 1).expand(12, *SHAPE)
    total = torch.tensor([0.2, 0.9, 0.1, 0.9, 0.5, 0.5, 0.5, 0.5, 0.0, 1.0, float("nan"), 0.3])
    groups = [4] * 4 + [5] * 4 + [6] * 4
    train = prepare(algorithm, rollout_of(final, groups), make_scores(total, torch.isfinite(total)), {})
    assert train.tensors["winner"][:, 0, 0, 0].tolist() == [1, 9]
    assert train.tensors["loser"][:, 0, 0, 0].tolist() == [2, 8]
    assert len(train) == train.total == 2 and train.metrics["dpo/pairs"] == 2
    assert train.metrics["dpo/dropped_fraction"] == pytest.approx(1 / 3)


def test_a_group_with_fewer_than_two_valid_scores_is_dropped():
    total = torch.tensor([0.2, float("nan"), float("nan"), 0.9])
    best, worst = best_worst_pairs(total, torch.isfinite(total), [0, 0, 1, 1])
    assert best.tolist() == worst.tolist() == []


def test_groups_that_all_tie_leave_nothing_to_learn():
    algorithm = build_algorithm({"type": "diffusion_dpo", "group_size": 4})
    rollout = rollout_of(torch.randn(8, *SHAPE), [0] * 4 + [1] * 4)
    train = prepare(algorithm, rollout, make_scores(torch.full((8,), 0.5)), {})
    assert len(train) == 0 and train.metrics["dpo/dropped_fraction"] == 1


def test_an_online_pair_gets_new_noise_with_every_policy_version():
    algorithm = build_algorithm({"type": "diffusion_dpo", "group_size": 4})
    final, scores = torch.randn(8, *SHAPE), make_scores(torch.arange(8.0))
    groups = [0] * 4 + [1] * 4
    noise = [
        prepare(algorithm, rollout_of(final, groups, version), scores, {}).tensors["noise"] for version in (0, 0, 1)
    ]
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])
    alone = prepare(algorithm, rollout_of(final[4:], groups[4:]), make_scores(scores.total[4:]), {})
    assert torch.equal(alone.tensors["noise"][0], noise[0][1])


def test_what_it_declares_depends_on_the_source():
    offline, online = dpo(), build_algorithm({"type": "diffusion_dpo", "reference_refresh": 40})
    assert offline.needs.batch is PreferencePairs and online.needs.batch is Trajectories
    assert (offline.needs.scores, online.needs.scores) == (False, True)
    assert offline.plan(0, 0) is None and plan_of(online).noise.kind == "ode"
    assert (offline.needs.reference, online.needs.reference) == (Reference(), Reference(refresh=40))
    assert (offline.needs.group_size, online.needs.group_size) == (2, 8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"guidance_until": 0.5}, "guidance_until is for source: online"),
        ({"group_size": 8}, "group_size is for source: online"),
        ({"density": "logit_normal", "density_params": {"mean": 0.0}}, "density_params"),
        ({"reference_refresh": 0}, "greater than or equal to 1"),
    ],
)
def test_an_option_that_does_not_apply_is_refused(changes, said):
    with pytest.raises(ValidationError, match=said):
        dpo(**changes)
