"""The published variants of Flow-GRPO, each against numbers worked out by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch.distributions import Normal

from flowalign.algorithms import build_algorithm
from flowalign.algorithms.parts.credit import best_and_worst, group_advantages
from flowalign.config.updates import OptimizerConfig
from flowalign.engine.base import EngineSettings
from flowalign.engine.build import build_engine
from flowalign.intake.file import load_align
from flowalign.types import value_of
from tests.algorithms.every import plan_of
from tests.algorithms.grpo_rollouts import assert_all_close, by_step, g2rpo, gradients, grpo, moved, roll_out
from tests.algorithms.toy import LinearVelocity, condition, make_scores
from tests.algorithms.whole import prepare
from tests.learners import make_learner

KINDS = ("flow", "dance", "cps")
REWARDS = torch.tensor([0.0, 1.0, 0.5, 0.2, 1.0, 0.0, 0.0, 1.0])
RECIPES = Path(__file__).resolve().parents[2] / "configs" / "shapes"


def normal(stats) -> Normal:
    return Normal(stats.mean, stats.std.expand_as(stats.mean))


# GRPO-Guard


@pytest.mark.parametrize("kind", KINDS)
def test_the_normalised_ratio_of_the_rollout_s_own_weights_is_exactly_1(kind):
    model, algorithm = LinearVelocity(), grpo(ratio="guard", kind=kind)
    train = prepare(algorithm, roll_out(algorithm, model), make_scores(REWARDS), {})
    metrics = algorithm.loss({"policy": model}, train).metrics
    assert value_of(metrics["ratio/mean"]) == 1
    assert value_of(metrics["ratio/clip_fraction"]) == value_of(metrics["replay/max_abs_dlogp"]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_guard_s_gradient_is_that_of_its_published_formula(kind):
    old, new, algorithm = LinearVelocity(), moved(), grpo(ratio="guard", kind=kind, clip_range=1e-3)
    rollout = roll_out(algorithm, old)
    train = prepare(algorithm, rollout, make_scores(REWARDS), {})
    got = algorithm.loss({"policy": new}, train)

    advantage = group_advantages(REWARDS, torch.ones(8, dtype=torch.bool), rollout.batch.group_ids).values
    begin, end = rollout.plan.noise.window
    losses, ratios = [], []
    steps = zip(range(begin, end), by_step(rollout, new), by_step(rollout, old), strict=True)
    for k, (x_next, stats), (_, before) in steps:
        std, delta = stats.std.flatten(), rollout.plan.sigmas[k + 1] - rollout.plan.sigmas[k]
        log_ratio = (normal(stats).log_prob(x_next) - normal(before).log_prob(x_next)).mean((1, 2, 3))
        bias = (stats.mean - before.mean).square().mean((1, 2, 3)) / (2 * std**2)
        ratio = torch.exp((log_ratio + bias) * std)
        losses.append(torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - 1e-3, 1 + 1e-3)) / -delta)
        ratios.append(ratio)
    loss, ratio = torch.stack(losses).mean(), torch.stack(ratios)
    assert 0 < value_of(got.metrics["ratio/clip_fraction"]) < 1
    torch.testing.assert_close(value_of(got.metrics["ratio/mean"]) - 1, ratio.mean().detach() - 1, rtol=1e-2, atol=1e-6)
    parameters = list(new.parameters())
    expected = torch.autograd.grad(loss, parameters)
    assert_all_close(torch.autograd.grad(got.loss, parameters), expected, rtol=1e-3, atol=1e-6)


def test_only_the_guard_keeps_the_rollout_s_means():
    model = LinearVelocity()
    assert roll_out(grpo(), model).means_NSCHW is None
    rollout = roll_out(grpo(ratio="guard"), model)
    assert rollout.means_NSCHW is not None
    for s, (_, stats) in enumerate(by_step(rollout, model)):
        torch.testing.assert_close(rollout.means_NSCHW[:, s], stats.mean.detach())


# Clip ranges


@pytest.mark.parametrize(
    ("low", "high", "log_ratio", "stopped"),
    [(1e-3, 0.1, 0.01, 0), (1e-3, 0.1, -0.01, -1), (0.1, 1e-3, 0.01, 1), (0.1, 1e-3, -0.01, 0)],
)
def test_the_two_sides_of_the_clip_range_stop_gradients_of_their_own(low, high, log_ratio, stopped):
    """Beyond the upper end advantages > 0 have no gradient left, beyond the lower end those < 0."""
    model, algorithm = LinearVelocity(), grpo(clip_range={"low": low, "high": high})
    train = prepare(algorithm, roll_out(algorithm, model), make_scores(REWARDS), {})
    moved_on = {**train.tensors, "old_log_prob": train.tensors["old_log_prob"] - log_ratio}
    train = replace(train, tensors=moved_on)
    assert value_of(algorithm.loss({"policy": model}, train).metrics["ratio/clip_fraction"]) == abs(stopped)
    alive = train.tensors["advantage"].sign() != stopped
    unclipped = grpo(clip_range=10.0)
    kept = replace(train.take(alive.nonzero().flatten()), total=train.total)
    assert_all_close(gradients(algorithm, model, train), gradients(unclipped, model, kept), rtol=1e-4, atol=1e-7)


def test_one_number_is_a_clip_range_on_both_sides_and_stays_one_number():
    config = grpo(clip_range=2e-4).config
    assert config.clip_range.low == config.clip_range.high == 2e-4
    assert config.model_dump()["clip_range"] == 2e-4
    both = grpo(clip_range={"low": 1e-4, "high": 3e-4}).config
    assert both.model_dump()["clip_range"] == {"low": 1e-4, "high": 3e-4}
    assert type(both).model_validate_json(both.model_dump_json()) == both


# Training on some of the window's steps


def trained_steps(train, plan):
    """Steps of the schedule that are trained, (samples, n), by the sigmas of the transitions."""
    index = [plan.sigmas.index(sigma) for sigma in train.tensors["sigma"].tolist()]
    return torch.tensor(index).view(-1, len(index) // 8)


def test_every_sample_trains_on_its_own_draw_of_the_window_s_steps():
    model, algorithm = LinearVelocity(), grpo(train_steps=2)
    rollout = roll_out(algorithm, model)
    train = prepare(algorithm, rollout, make_scores(REWARDS), {})
    assert len(train) == train.total == 8 * 2
    steps = trained_steps(train, rollout.plan)
    assert all(1 <= a < b <= 3 for a, b in steps.tolist())
    assert len({tuple(row) for row in steps.tolist()}) > 1
    again = prepare(algorithm, rollout, make_scores(REWARDS), {})
    assert torch.equal(train.tensors["x"], again.tensors["x"])
    assert value_of(algorithm.loss({"policy": model}, train).metrics["replay/max_abs_dlogp"]) == 0


def test_a_sample_s_steps_depend_on_its_id_and_not_on_its_batch():
    algorithm = grpo(train_steps=1, beta=0.1)
    rollout = roll_out(algorithm, LinearVelocity(), groups=4)
    whole = prepare(algorithm, rollout, make_scores(torch.rand(16)), {})
    part = replace(
        rollout,
        batch=rollout.batch.take(range(8, 16)),
        condition=condition(8),
        states_NSCHW=rollout.states_NSCHW[8:],
        log_prob_NS=rollout.log_prob_NS[8:],
    )
    alone = prepare(algorithm, part, make_scores(torch.rand(8)), {})
    assert torch.equal(whole.tensors["sigma"][8:], alone.tensors["sigma"])


def test_drawn_for_the_iteration_all_samples_train_on_the_same_steps_and_all_steps_have_their_turn():
    """One step at a time, over its draws, is the gradient of the whole window: the mean of the three."""
    model, algorithm = LinearVelocity(), grpo(train_steps=1, train_steps_by="iteration")
    rollout = roll_out(algorithm, model)
    by_draw = {}
    for version in range(30):
        train = prepare(algorithm, replace(rollout, policy_version=version), make_scores(REWARDS), {})
        assert train.total == 8
        (step,) = set(trained_steps(train, rollout.plan).flatten().tolist())
        by_draw[step] = gradients(algorithm, model, train)
    assert sorted(by_draw) == [1, 2, 3]
    whole = grpo()
    expected = gradients(whole, model, prepare(whole, rollout, make_scores(REWARDS), {}))
    mean = [torch.stack(grads).mean(0) for grads in zip(*by_draw.values(), strict=True)]
    assert_all_close(mean, expected, rtol=1e-4, atol=1e-7)


# The best and the worst of a group


def test_best_and_worst_are_those_of_the_group_and_ties_go_by_order():
    values = torch.tensor([0.0, 1.0, 0.5, 0.2, 1.0, 0.0, 0.0, 1.0])
    everyone = torch.ones(8, dtype=torch.bool)
    kept = best_and_worst(values, everyone, [5, 5, 5, 5, 2, 2, 2, 2], best=1, worst=2)
    assert kept.tolist() == [True, True, False, True, True, True, True, False]


def test_an_invalid_sample_is_neither_best_nor_worst_and_a_small_group_is_kept_whole():
    values, valid = torch.tensor([9.0, 1.0, 0.5, 0.2]), torch.tensor([False, True, True, True])
    assert best_and_worst(values, valid, [0] * 4, best=1, worst=1).tolist() == [False, True, False, True]
    assert best_and_worst(values, valid, [0] * 4, best=2, worst=2).tolist() == [False, True, True, True]


def test_pruned_groups_keep_the_advantages_of_the_whole_group():
    model, algorithm = LinearVelocity(), grpo(keep={"best": 1, "worst": 1})
    rollout = roll_out(algorithm, model)
    train = prepare(algorithm, rollout, make_scores(REWARDS), {})
    assert len(train) == train.total == 4 * 3
    everyone = torch.ones(8, dtype=torch.bool)
    credit = group_advantages(REWARDS, everyone, rollout.batch.group_ids).values
    kept = torch.tensor([0, 1, 4, 6])
    assert torch.equal(train.tensors["advantage"], credit[kept].repeat_interleave(3))
    assert torch.equal(train.tensors["x"], rollout.states_NSCHW[kept, :3].flatten(0, 1))


def test_a_pruned_group_of_equal_rewards_still_counts_in_the_mean():
    algorithm = grpo(keep={"best": 1, "worst": 1})
    rewards = torch.tensor([0.0, 1.0, 0.5, 0.2, 0.7, 0.7, 0.7, 0.7])
    train = prepare(algorithm, roll_out(algorithm, LinearVelocity()), make_scores(rewards), {})
    assert (len(train), train.total) == (2 * 3, 4 * 3)


# Several epochs


def learner(model, algorithm, epochs):
    engine = build_engine(model, EngineSettings(type="torch", optimizer=OptimizerConfig(learning_rate=1e-2)))
    return make_learner(algorithm, {"policy": model}, engine, micro_batch_size=8, epochs=epochs)


def test_a_second_epoch_is_off_policy_by_the_first_one_s_step():
    algorithm = grpo(clip_range=1e-3)
    rollout, scores = roll_out(algorithm, LinearVelocity()), make_scores(REWARDS)
    model = LinearVelocity()
    one = learner(model, algorithm, epochs=1).update(rollout, scores, 0).metrics
    after = algorithm.loss({"policy": model}, prepare(algorithm, rollout, scores, {})).metrics
    two = learner(LinearVelocity(), algorithm, epochs=2).update(rollout, scores, 0).metrics
    assert one["ratio/mean"] == pytest.approx(1, abs=1e-12) and one["ratio/clip_fraction"] == 0
    assert abs(float(value_of(after["ratio/mean"])) - 1) > 1e-4 and value_of(after["ratio/clip_fraction"]) > 0
    # Metrics are means over both epochs, the replay's deviation the first one's.
    assert two["ratio/mean"] == pytest.approx((1 + float(value_of(after["ratio/mean"]))) / 2, abs=1e-6)
    assert two["ratio/clip_fraction"] == pytest.approx(float(value_of(after["ratio/clip_fraction"])) / 2)
    assert two["replay/max_abs_dlogp"] == 0 and two["learner/updates"] == 2


# Configuration


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"window": {"kind": "random", "size": 2, "every": 5}}, "every: a random window does not slide"),
        ({"window": {"kind": "full", "wrap": False}}, "wrap: a full window does not slide"),
        ({"window": {"kind": "sliding", "size": 9}}, "no 9 noisy steps in a row"),
        ({"window": {"kind": "full", "start": 5}, "kind": "cps"}, "window: of 6 steps of kind 'cps' none inside"),
        ({"window": {"kind": "fixed", "size": 0}}, "greater than or equal to 1"),
        ({"num_steps": 1, "kind": "cps", "window": {}}, "window: of 1 steps"),
        ({"train_steps": 4}, "train_steps: is 4, but the window has 3 steps"),
        ({"train_steps_by": "iteration"}, "train_steps_by: without train_steps"),
        ({"share_prefix": True}, "share_prefix: set initial_noise: group"),
        ({"share_prefix": True, "initial_noise": "group", "window": {}}, "share_prefix: the window begins at step 0"),
        ({"ratio": "guard", "log_prob": "unnormalised"}, "ratio: guard normalises a Gaussian log-prob"),
        ({"keep": {"best": 3, "worst": 2}}, "keep: 3 best and 2 worst are more than group_size, 4"),
        ({"granularities": []}, "at least 1 item"),
        ({"granularities": [1, 0]}, "greater than or equal to 1"),
        ({"granularities": [2, 2]}, "would score an image twice"),
        ({"granularities": [1, 2], "window": {}}, "granularities: 0 steps are left when the window ends at 6"),
        ({"granularities": [1, 2, 3], "window": {"kind": "fixed", "start": 2, "size": 2}}, "2 or 3 of them at a time"),
        ({"granularities": [1, 2], "window": {"kind": "random", "size": 1, "stop": 5}}, "1 steps are left"),
        ({"clip_range": 0}, "greater than 0"),
        ({"clip_range": "wide"}, "valid number"),
        ({"clip_range": {"low": 0.1}}, "Field required"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, reason):
    with pytest.raises(ValidationError, match=reason):
        grpo(**options)


def test_a_sliding_window_is_the_plan_of_its_iteration():
    algorithm = grpo(window={"kind": "sliding", "size": 2, "every": 2, "stop": 4})
    windows = [algorithm.plan(i, 0).noise.window for i in range(7)]
    assert windows == [(0, 2), (0, 2), (1, 3), (1, 3), (2, 4), (2, 4), (0, 2)]


def test_the_config_of_every_variant_survives_a_round_trip():
    config = g2rpo(
        window={"kind": "sliding", "size": 2, "stop": 3, "every": 7, "decay": 0.1, "wrap": False},
        train_steps=1,
        train_steps_by="iteration",
        ratio="guard",
        clip_range={"low": 1e-5, "high": 2e-5},
        keep={"best": 1, "worst": 2},
        granularities=(1, 2),
    ).config
    assert type(config).model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("name", ["mix_grpo", "grpo_guard", "flow_grpo_fast"])
def test_the_recipe_loads_and_rolls_out_as_its_name_says(name):
    config = load_align(RECIPES / f"{name}.yaml").config
    algorithm = build_algorithm(config.algorithm)
    plans = [plan_of(algorithm, i, config.seed) for i in (0, 25, 50)]
    if name == "mix_grpo":
        assert [plan.noise.window for plan in plans] == [(0, 3), (1, 4), (2, 5)] and plans[0].branching.shared_prefix
    elif name == "grpo_guard":
        assert all(plan.keep_means for plan in plans) and config.learner.updates_per_iteration > 1
    else:
        assert plans[0].noise.kind == "cps" and config.algorithm["train_steps"] == 1
