from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from flowalign.algorithms import build_algorithm
from flowalign.algorithms.opd import OPD
from flowalign.algorithms.parts.teachers import NoTeacher
from flowalign.flow import sde
from flowalign.types import Guidance, value_of
from tests.algorithms.toy import SHAPE, LinearVelocity, condition, make_rollout, make_scores
from tests.algorithms.whole import prepare

SDE = {"kind": "flow", "noise_level": 0.6}
TASKS = ("position", "counting", "position", "colors", "counting", "counting", "colors", "position")


def opd(**changes) -> OPD:
    return OPD(
        OPD.Config.model_validate({"type": "opd", "num_steps": 6, "teachers": {"one": {"path": "t"}}, **changes})
    )


def two_teachers(**changes):
    teachers = {"place": {"path": "a", "tasks": ["position"]}, "rest": {"path": "b", "guidance_scale": 3.0}}
    return opd(teachers=teachers, **changes)


def with_tasks(rollout, tasks=TASKS, key="tag"):
    metadata = tuple({key: task} for task in tasks)
    return replace(rollout, batch=replace(rollout.batch, metadata=metadata))


def prepared(algorithm, models, scores=None, seed=0):
    rollout = with_tasks(make_rollout(models["policy"], algorithm.plan(0, 0), seed=seed))
    with torch.no_grad():
        return prepare(algorithm, rollout, scores, models)


@pytest.mark.parametrize("kind", [{}, SDE, {"kind": "dance", "noise_level": 0.3}, {"kind": "cps", "noise_level": 0.7}])
def test_a_teacher_equal_to_the_student_gives_exactly_zero_and_no_gradient(kind):
    algorithm, model = opd(**kind), LinearVelocity()
    models = {"policy": model, "teacher:one": LinearVelocity()}
    output = algorithm.loss(models, prepared(algorithm, models))
    assert output.loss.detach() == 0
    assert all(bool((g == 0).all()) for g in torch.autograd.grad(output.loss, list(model.parameters())))


@pytest.mark.parametrize("kind", ["flow", "dance", "cps"])
def test_the_sde_form_is_the_mean_of_torch_s_kl_divergence(kind):
    algorithm = opd(kind=kind, noise_level=0.5)
    models = {"policy": LinearVelocity(0), "teacher:one": LinearVelocity(1)}
    train = prepared(algorithm, models)
    plan, item = train.shared["plan"], train.tensors
    steps = [
        sde.reverse_step(
            kind, item["x"], model(item["x"], item["sigma"], None), item["sigma"], item["sigma_next"], 0.5,
            plan.sigma_max,
        )
        for model in (models["policy"], models["teacher:one"])
    ]  # fmt: skip
    student, teacher = (torch.distributions.Normal(s.mean, s.std.expand_as(s.mean)) for s in steps)
    expected = torch.distributions.kl_divergence(student, teacher).flatten(1).mean(1).mean()
    output = algorithm.loss(models, train)
    torch.testing.assert_close(output.metrics["loss/opd"], expected.detach(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(output.loss.detach(), expected.detach(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["flow", "dance", "cps"])
def test_std_squared_times_the_kl_tends_to_the_ode_form(kind):
    """At the same states: the closer, the less noise there is."""
    models = {"policy": LinearVelocity(0), "teacher:one": LinearVelocity(1)}
    without = opd(window={"kind": "fixed", "start": 1, "size": 4})
    train = prepared(without, models)
    limit = value_of(without.loss(models, train).metrics["loss/opd"])
    distances = []
    for noise_level in (0.3, 0.03, 0.003):
        algorithm = opd(kind=kind, noise_level=noise_level, window={"kind": "fixed", "start": 1, "size": 4})
        plan, item = algorithm.plan(0, 0), train.tensors
        means = [
            sde.reverse_step(kind, item["x"], v, item["sigma"], item["sigma_next"], noise_level, plan.sigma_max)
            for v in (models["policy"](item["x"], item["sigma"], None), item["target"])
        ]
        std = means[0].std
        scaled = std.flatten().square() * sde.kl_mean(means[0].mean, means[1].mean, std)
        distances.append(float((scaled.mean() - limit).abs().detach() / limit))
    assert distances[0] > distances[1] > distances[2] and distances[2] < 1e-3


def test_the_ode_form_is_half_the_squared_distance_of_where_the_steps_lead():
    """For v = w x + b by hand: Δ²/2 · mean_d ((w_S - w_T) x + b_S - b_T)²."""
    algorithm, models = opd(), {"policy": LinearVelocity(0), "teacher:one": LinearVelocity(1)}
    train = prepared(algorithm, models)
    student, teacher, item = models["policy"], models["teacher:one"], train.tensors
    delta = (item["sigma_next"] - item["sigma"]).view(-1, 1, 1, 1)
    apart = (student.weight - teacher.weight) * item["x"] + student.bias - teacher.bias
    expected = (delta * apart).square().mean() / 2
    loss = algorithm.loss(models, train).loss
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-8)
    got = torch.autograd.grad(loss, student.weight)[0]
    by_hand = (delta.square() * apart * item["x"]).mean(0) / apart[0].numel()
    torch.testing.assert_close(got, by_hand.detach(), rtol=1e-4, atol=1e-8)


def test_the_states_of_an_ode_rollout_are_its_own_trajectory():
    algorithm, model = opd(), LinearVelocity()
    item = prepared(algorithm, {"policy": model, "teacher:one": LinearVelocity(1)}).tensors
    assert len(item["x"]) == 8 * 6 and algorithm.plan(0, 0).noise.window == (0, 6)
    delta = (item["sigma_next"] - item["sigma"]).view(-1, 1, 1, 1)
    walked = item["x"] + delta * model(item["x"], item["sigma"], None)
    torch.testing.assert_close(walked.view(8, 6, *SHAPE)[:, :-1], item["x"].view(8, 6, *SHAPE)[:, 1:])


def test_the_gradient_reaches_the_student_only():
    algorithm = two_teachers(**SDE)
    models = {"policy": LinearVelocity(0), "teacher:place": LinearVelocity(1), "teacher:rest": LinearVelocity(2)}
    algorithm.loss(models, prepared(algorithm, models)).loss.backward()
    assert bool((models["policy"].weight.grad != 0).any())
    assert models["teacher:place"].weight.grad is None and models["teacher:rest"].weight.grad is None


def test_each_sample_learns_from_the_teacher_of_its_task_with_that_teacher_s_guidance():
    algorithm = two_teachers(guidance_scale=2.0)
    models = {"policy": LinearVelocity(0), "teacher:place": LinearVelocity(1), "teacher:rest": LinearVelocity(2)}
    train = prepared(algorithm, models)
    item = train.tensors
    place = torch.tensor([task == "position" for task in TASKS]).repeat_interleave(6)
    assert torch.equal(item["teacher"] == 0, place)
    with torch.no_grad():
        first = models["teacher:place"](item["x"], item["sigma"], None, guidance=Guidance(1.0))
        second = models["teacher:rest"](item["x"], item["sigma"], None, guidance=Guidance(3.0))
    assert torch.equal(item["target"], torch.where(place.view(-1, 1, 1, 1), first, second))


def test_the_route_is_a_function_of_the_sample_not_of_its_batch():
    algorithm = two_teachers()
    assert algorithm.teacher_of({"tag": "position"}) == "place"
    assert algorithm.teacher_of({"tag": "position", "task": "counting"}) == "rest"
    assert algorithm.teacher_of({}) == "rest"


def test_shares_of_the_teachers_add_up_to_the_loss():
    algorithm = two_teachers(**SDE)
    models = {"policy": LinearVelocity(0), "teacher:place": LinearVelocity(1), "teacher:rest": LinearVelocity(2)}
    metrics = algorithm.loss(models, prepared(algorithm, models)).metrics
    place, rest = (value_of(metrics[f"loss/opd/{teacher}"]) for teacher in ("place", "rest"))
    torch.testing.assert_close(place + rest, value_of(metrics["loss/opd"]))
    assert min(place, rest) > 0


def test_a_task_without_a_teacher_is_refused_by_name():
    algorithm = opd(teachers={"place": {"path": "a", "tasks": ["position"]}})
    models = {"policy": LinearVelocity(0), "teacher:place": LinearVelocity(1)}
    with pytest.raises(NoTeacher, match="'counting'"):
        prepared(algorithm, models)


@pytest.mark.parametrize("size", [1, 7])
def test_the_gradient_is_invariant_to_the_micro_batch_split(size):
    algorithm = two_teachers(reward_weight=0.1, group_size=4, **SDE)
    models = {"policy": LinearVelocity(0), "teacher:place": LinearVelocity(1), "teacher:rest": LinearVelocity(2)}
    train = prepared(algorithm, models, make_scores(torch.tensor([0.0, 1.0, 0.5, 0.2, 1.0, 0.0, 0.0, 1.0])))
    parameters = list(models["policy"].parameters())
    whole = torch.autograd.grad(algorithm.loss(models, train).loss, parameters)
    split = [torch.zeros_like(g) for g in whole]
    for part in torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).split(size):
        grads = torch.autograd.grad(algorithm.loss(models, train.take(part)).loss, parameters)
        split = [a + g * len(part) / len(train) for a, g in zip(split, grads, strict=True)]
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_steps_down_the_gradient_bring_the_student_to_its_teacher():
    algorithm, teacher = opd(), LinearVelocity(1)
    models = {"policy": LinearVelocity(0), "teacher:one": teacher}
    optimizer = torch.optim.Adam(models["policy"].parameters(), lr=0.05)
    losses = []
    for iteration in range(60):
        output = algorithm.loss(models, prepared(algorithm, models, seed=iteration))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < losses[0] / 100


def test_a_reward_beside_the_distillation_adds_flow_grpo_s_gradient():
    scores = make_scores(torch.tensor([0.0, 1.0, 0.5, 0.2, 1.0, 0.0, 0.0, 1.0]))
    models = {"policy": LinearVelocity(0), "teacher:one": LinearVelocity(1)}
    plain = opd(group_size=4, **SDE)
    mixed = opd(group_size=4, reward_weight=0.5, **SDE)
    grpo = build_algorithm({"type": "flow_grpo", "num_steps": 6, "group_size": 4, **SDE})
    rollout = with_tasks(make_rollout(models["policy"], mixed.plan(0, 0)))
    parameters = list(models["policy"].parameters())
    with torch.no_grad():
        trains = [prepare(algorithm, rollout, scores, models) for algorithm in (plain, mixed, grpo)]
    distil, both, reward = (
        torch.autograd.grad(algorithm.loss(models, train).loss * len(train) / train.total, parameters)
        for algorithm, train in zip((plain, mixed, grpo), trains, strict=True)
    )
    for a, b, c in zip(distil, both, reward, strict=True):
        torch.testing.assert_close(b, a + 0.5 * c, rtol=1e-4, atol=1e-6)
        assert bool((c != 0).any())
    assert value_of(mixed.loss(models, trains[1]).metrics["replay/max_abs_dlogp"]) == 0


def test_the_teacher_s_opinion_as_an_advantage_has_the_kl_s_gradient_on_average():
    """On the student's own weights: -E[(log p_T - log p_S) ∇log p_S] is ∇KL, over d because both are means."""
    settings = {"num_steps": 3, "window": {"kind": "fixed", "start": 1, "size": 1}, "kind": "dance", "noise_level": 1.0}
    dense, closed = opd(distillation="advantage", clip_range=10.0, **settings), opd(**settings)
    models = {"policy": LinearVelocity(0), "teacher:one": LinearVelocity(1)}
    plan = dense.plan(0, 0)
    rollout = make_rollout(models["policy"], plan, groups=2, size=20_000)
    parameters = list(models["policy"].parameters())
    with torch.no_grad():
        trains = [prepare(algorithm, rollout, None, models) for algorithm in (dense, closed)]
    got, expected = (
        torch.autograd.grad(algorithm.loss(models, train).loss, parameters)
        for algorithm, train in zip((dense, closed), trains, strict=True)
    )
    dimensions = rollout.states_NSCHW[0, 0].numel()
    for a, b in zip(got, expected, strict=True):
        cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
        assert cosine > 0.95
        assert float(a.norm() * dimensions / b.norm()) == pytest.approx(1, abs=0.15)


def test_a_random_window_is_a_function_of_seed_and_iteration_and_moves():
    algorithm = opd(window={"kind": "random", "size": 2, "stop": 5})
    windows = [algorithm.plan(i, 3).noise.window for i in range(20)]
    assert windows == [algorithm.plan(i, 3).noise.window for i in range(20)]
    assert len(set(windows)) > 1 and all(end - begin == 2 and end <= 5 for begin, end in windows)


def test_it_needs_scores_only_with_a_reward():
    assert not opd().needs.scores
    assert opd(reward_weight=1.0, group_size=4, **SDE).needs.scores
    assert two_teachers().needs.roles == ("policy", "teacher:place", "teacher:rest")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teachers": {}}, "at least 1 item"),
        ({"teachers": {"a": {"path": "x"}, "b": {"path": "y"}}}, "a and b both have all other tasks"),
        (
            {"teachers": {"a": {"path": "x", "tasks": ["colors"]}, "b": {"path": "y", "tasks": ["colors"]}}},
            "both have the task 'colors'",
        ),
        ({"noise_level": 0.5}, "noise_level: 0 with kind ode"),
        ({"kind": "flow"}, "noise_level: 0 with kind ode"),
        ({"reward_weight": 1.0, "group_size": 4}, "reward_weight: a policy gradient needs steps with noise"),
        ({"reward_weight": 1.0, **SDE}, "group_size: a reward is compared within a group"),
        ({"window": {"kind": "fixed", "size": 0}}, "greater than or equal to 1"),
        ({"window": {"kind": "fixed", "start": 5, "size": 2}}, "leaves the schedule"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(changes, said):
    with pytest.raises(ValidationError, match=said):
        opd(**changes)


def test_the_config_survives_a_round_trip():
    config = two_teachers(window={"kind": "random", "size": 2}, **SDE).config
    assert type(config).model_validate_json(config.model_dump_json()) == config


def test_the_condition_goes_with_its_sample():
    """A teacher that answers with the prompt's own row."""

    def row(x, t, condition, **options):
        return condition.index_N.view(-1, 1, 1, 1).expand_as(x).float()

    algorithm = two_teachers()
    rollout = with_tasks(make_rollout(LinearVelocity(), algorithm.plan(0, 0)))
    rollout = replace(rollout, condition=replace(condition(8), index_N=torch.arange(8)))
    train = prepare(algorithm, rollout, None, {"teacher:place": row, "teacher:rest": row})
    assert torch.equal(train.tensors["target"][:, 0, 0, 0], torch.arange(8.0).repeat_interleave(6))


def test_each_reward_may_be_normalised_by_itself():
    """One reward has a hundred times the spread of the other, and the other way round what is good."""
    by_reward = {"wide": torch.tensor([0.0, 100.0] * 4), "narrow": torch.tensor([1.0, 0.0, 0.0, 1.0] * 2)}
    total = by_reward["wide"] + by_reward["narrow"]
    scores = replace(make_scores(total), by_reward=by_reward, weights={"wide": 1.0, "narrow": 1.0})
    models = {"policy": LinearVelocity(0), "teacher:one": LinearVelocity(1)}
    together, apart = (
        prepared(opd(reward_weight=1.0, group_size=4, normalize=n, **SDE), models, scores).tensors["advantage"]
        for n in ("total", "per_reward")
    )
    assert together[6 * 1] > 0.9 and abs(float(apart[6 * 1])) < 1e-3
    assert apart[6 * 3] > 1.3 and apart[6 * 2] < -1.3
