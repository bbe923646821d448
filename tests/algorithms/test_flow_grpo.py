from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from flowalign.algorithms.flow_grpo import FlowGRPO
from flowalign.algorithms.parts.credit import group_advantages
from flowalign.flow import sde
from flowalign.flow.sde import step_log_prob
from flowalign.types import value_of
from tests.algorithms.toy import LinearVelocity, make_rollout, make_scores
from tests.algorithms.whole import prepare

KINDS = ("flow", "dance", "cps")


def grpo(**changes) -> FlowGRPO:
    return FlowGRPO(
        FlowGRPO.Config.model_validate(
            {"type": "flow_grpo", "num_steps": 6, "noise_level": 0.6, "group_size": 4, **changes}
        )
    )


def scored(algorithm, model, rewards=None, seed=0):
    plan = algorithm.plan(0, 0)
    rollout = make_rollout(model, plan, seed=seed)
    rewards = torch.tensor([0.0, 1.0, 0.5, 0.2, 1.0, 0.0, 0.0, 1.0]) if rewards is None else rewards
    return rollout, make_scores(rewards)


def gradients(algorithm, models, train):
    algorithm_loss = algorithm.loss(models, train)
    coverage = len(train) / train.total
    parameters = list(models["policy"].parameters())
    return torch.autograd.grad(algorithm_loss.loss * coverage, parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_replay_on_the_rollout_weights_is_exact(kind):
    model, algorithm = LinearVelocity(), grpo(kind=kind, window={"kind": "random", "size": 2})
    rollout, scores = scored(algorithm, model)
    train = prepare(algorithm, rollout, scores, {"policy": model})
    output = algorithm.loss({"policy": model}, train)
    assert value_of(output.metrics["replay/max_abs_dlogp"]) == 0
    assert value_of(output.metrics["ratio/mean"]) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_gradient_is_reinforce_with_the_group_baseline_over_d(kind):
    """Without std-normalisation and clipping: -mean over transitions of A · ∇ log p, log p a mean over d."""
    model, algorithm = LinearVelocity(), grpo(kind=kind, std="none", clip_range=10.0)
    rollout, scores = scored(algorithm, model)
    train = prepare(algorithm, rollout, scores, {"policy": model})
    got = gradients(algorithm, {"policy": model}, train)

    plan, rewards = rollout.plan, scores.total
    advantage = rewards - rewards.view(2, 4).mean(1).repeat_interleave(4)
    begin, end = plan.noise.window
    total = torch.zeros(())
    for s, k in enumerate(range(begin, end)):
        x, x_next = rollout.states_NSCHW[:, s], rollout.states_NSCHW[:, s + 1]
        v = model(x, torch.full((8,), plan.sigmas[k]), None)
        stats = sde.reverse_step(
            plan.noise.kind, x, v, plan.sigmas[k], plan.sigmas[k + 1], plan.noise.level, plan.sigma_max
        )
        normal = torch.distributions.Normal(stats.mean, stats.std.expand_as(stats.mean))
        total = total - (advantage * normal.log_prob(x_next).flatten(1).sum(1)).sum()
    dimensions = rollout.states_NSCHW[0, 0].numel()
    expected = torch.autograd.grad(total / (8 * (end - begin)) / dimensions, list(model.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_equal_rewards_leave_nothing_to_learn():
    model, algorithm = LinearVelocity(), grpo()
    rollout, scores = scored(algorithm, model, torch.full((8,), 0.3))
    train = prepare(algorithm, rollout, scores, {"policy": model})
    assert len(train) == 0 and train.metrics["zero_std_fraction"] == 1


def test_equal_rewards_give_zero_gradient_even_where_the_group_is_kept():
    """With β > 0 the transitions stay for the KL, which is 0 at the reference: so is its gradient."""
    model, algorithm = LinearVelocity(), grpo(beta=0.5)
    rollout, scores = scored(algorithm, model, torch.full((8,), 0.3))
    models = {"policy": model, "reference": LinearVelocity()}
    train = prepare(algorithm, rollout, scores, models)
    assert len(train) == train.total == 8 * rollout.log_prob_NS.shape[1]
    assert all(bool((g == 0).all()) for g in gradients(algorithm, models, train))


def test_dropping_silent_groups_changes_no_gradient():
    model, algorithm = LinearVelocity(), grpo()
    rollout, _ = scored(algorithm, model)
    rewards = torch.tensor([0.0, 1.0, 0.5, 0.2, 0.7, 0.7, 0.7, 0.7])
    train = prepare(algorithm, rollout, make_scores(rewards), {"policy": model})
    assert len(train) == train.total // 2
    got = gradients(algorithm, {"policy": model}, train)

    credit = group_advantages(rewards, torch.ones(8, dtype=torch.bool), rollout.batch.group_ids).values
    total, plan = torch.zeros(()), rollout.plan
    for s, k in enumerate(range(*plan.noise.window)):
        x, x_next = rollout.states_NSCHW[:, s], rollout.states_NSCHW[:, s + 1]
        v = model(x, torch.full((8,), plan.sigmas[k]), None)
        stats = sde.reverse_step(
            plan.noise.kind, x, v, plan.sigmas[k], plan.sigmas[k + 1], plan.noise.level, plan.sigma_max
        )
        total = total - (credit * step_log_prob(plan, x_next, stats.mean, stats.std)).sum()
    expected = torch.autograd.grad(total / train.total, list(model.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_an_invalid_sample_reaches_no_loss():
    model, algorithm = LinearVelocity(), grpo(beta=0.1)
    rollout, _ = scored(algorithm, model)
    rewards = torch.tensor([0.0, 1.0, float("nan"), 0.2, 1.0, 0.0, 0.0, 1.0])
    scores = make_scores(rewards, torch.isfinite(rewards))
    models = {"policy": model, "reference": LinearVelocity(1)}
    train = prepare(algorithm, rollout, scores, models)
    assert len(train) == train.total == 7 * rollout.log_prob_NS.shape[1]
    assert torch.isfinite(algorithm.loss(models, train).loss)


def test_clipping_stops_the_gradient_only_in_the_direction_already_taken():
    model, algorithm = LinearVelocity(), grpo(clip_range=1e-3)
    rollout, scores = scored(algorithm, model)
    train = prepare(algorithm, rollout, scores, {"policy": model})
    for shift, sign in ((0.01, 1), (-0.01, -1)):
        moved = {**train.tensors, "old_log_prob": train.tensors["old_log_prob"] - shift}
        batch = replace(train, tensors=moved)
        output = algorithm.loss({"policy": model}, batch)
        assert value_of(output.metrics["ratio/clip_fraction"]) == 1
        alive = batch.tensors["advantage"].sign() == -sign
        got = torch.autograd.grad(output.loss, list(model.parameters()))
        kept = algorithm.loss({"policy": model}, batch.take(alive.nonzero().flatten()))
        expected = torch.autograd.grad(kept.loss * alive.float().mean(), list(model.parameters()))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kl", ["mean", "velocity"])
def test_kl_has_the_value_of_its_formula_and_a_gradient_for_the_policy_only(kl):
    model, reference = LinearVelocity(0), LinearVelocity(1)
    algorithm = grpo(beta=2.0, kl=kl)
    rollout, scores = scored(algorithm, model)
    models = {"policy": model, "reference": reference}
    train = prepare(algorithm, rollout, scores, models)
    output = algorithm.loss(models, train)
    plan, item = rollout.plan, train.tensors
    ours, theirs = (m(item["x"], item["sigma"], None) for m in (model, reference))
    if kl == "velocity":
        expected = (ours - theirs).square().mean()
    else:
        steps = [
            sde.reverse_step(
                plan.noise.kind, item["x"], v, item["sigma"], item["sigma_next"], plan.noise.level, plan.sigma_max
            )
            for v in (ours, theirs)
        ]
        normals = [torch.distributions.Normal(s.mean, s.std.expand_as(s.mean)) for s in steps]
        expected = torch.distributions.kl_divergence(*normals).flatten(1).mean(1).mean()
    torch.testing.assert_close(output.metrics["loss/kl"], expected.detach(), rtol=1e-5, atol=1e-7)
    output.loss.backward()
    assert model.weight.grad is not None and bool((model.weight.grad != 0).any())
    assert reference.weight.grad is None


def test_the_loss_is_invariant_to_the_micro_batch_split():
    model, algorithm = LinearVelocity(), grpo()
    rollout, scores = scored(algorithm, model)
    train = prepare(algorithm, rollout, scores, {"policy": model})
    whole = algorithm.loss({"policy": model}, train).loss
    parts = torch.arange(len(train)).split(5)
    split = sum(algorithm.loss({"policy": model}, train.take(p)).loss * len(p) / len(train) for p in parts)
    torch.testing.assert_close(whole, split)


def test_a_random_window_is_a_function_of_seed_and_iteration_and_moves():
    algorithm = grpo(window={"kind": "random", "size": 2, "stop": 5})
    windows = [algorithm.plan(i, 3).noise.window for i in range(20)]
    assert windows == [algorithm.plan(i, 3).noise.window for i in range(20)]
    assert len(set(windows)) > 1 and all(end - begin == 2 and end <= 5 for begin, end in windows)


@pytest.mark.parametrize(
    "window", [{"kind": "fixed", "start": 5, "size": 2}, {"kind": "random", "size": 7}, {"kind": "fixed"}]
)
def test_a_window_outside_the_schedule_is_refused_with_the_configuration(window):
    with pytest.raises(ValidationError):
        grpo(window=window)


def test_the_config_survives_a_round_trip():
    config = grpo(kind="dance", beta=0.04, window={"kind": "random", "size": 3}).config
    assert type(config).model_validate_json(config.model_dump_json()) == config
