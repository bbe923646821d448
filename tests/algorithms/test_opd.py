import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from flowalign.algorithm import build_algorithm
from flowalign.algorithms.opd import NoTeacher
from flowalign.cluster.run import build_run, run_align
from flowalign.cluster.workers import LearnerWorker, RolloutWorker
from flowalign.config import AlignConfig, ConfigError, RewardConfig
from flowalign.configfile import load_align
from flowalign.export import export, load_pipeline
from flowalign.flow import sde
from flowalign.metrics import read_metrics
from flowalign.models.base import ModelError
from tests._model_directory import write_config, write_model_directory
from tests._tiny import run_config, write_checkpoint, write_pipeline
from tests.algorithms.toy import SHAPE, LinearVelocity, condition, make_rollout, make_scores

SDE = {"kind": "flow", "noise_level": 0.6}
TASKS = ("position", "counting", "position", "colors", "counting", "counting", "colors", "position")


def opd(**changes):
    return build_algorithm({"type": "opd", "num_steps": 6, "teachers": {"one": {"path": "t"}}, **changes})


def two_teachers(**changes):
    teachers = {"place": {"path": "a", "tasks": ["position"]}, "rest": {"path": "b", "guidance_scale": 3.0}}
    return opd(teachers=teachers, **changes)


def with_tasks(rollout, tasks=TASKS, key="tag"):
    metadata = tuple({key: task} for task in tasks)
    return replace(rollout, batch=replace(rollout.batch, metadata=metadata))


def prepared(algorithm, models, scores=None, seed=0):
    rollout = with_tasks(make_rollout(models["policy"], algorithm.rollout_plan(0, 0), seed=seed))
    with torch.no_grad():
        return algorithm.prepare(rollout, scores, models)


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
    spec, item = train.shared["spec"], train.tensors
    steps = [
        sde.reverse_step(
            kind, item["x"], model(item["x"], item["sigma"], None), item["sigma"], item["sigma_next"], 0.5,
            spec.sigma_max,
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
    limit = without.loss(models, train).metrics["loss/opd"]
    distances = []
    for noise_level in (0.3, 0.03, 0.003):
        algorithm = opd(kind=kind, noise_level=noise_level, window={"kind": "fixed", "start": 1, "size": 4})
        spec, item = algorithm.rollout_plan(0, 0), train.tensors
        means = [
            sde.reverse_step(kind, item["x"], v, item["sigma"], item["sigma_next"], noise_level, spec.sigma_max)
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
    assert len(item["x"]) == 8 * 6 and algorithm.rollout_plan(0, 0).window == (0, 6)
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
        first = models["teacher:place"](item["x"], item["sigma"], None, guidance=1.0)
        second = models["teacher:rest"](item["x"], item["sigma"], None, guidance=3.0)
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
    parts = metrics["loss/opd/place"] + metrics["loss/opd/rest"]
    torch.testing.assert_close(parts, metrics["loss/opd"])
    assert min(metrics["loss/opd/place"], metrics["loss/opd/rest"]) > 0


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
    rollout = with_tasks(make_rollout(models["policy"], mixed.rollout_plan(0, 0)))
    parameters = list(models["policy"].parameters())
    with torch.no_grad():
        trains = [algorithm.prepare(rollout, scores, models) for algorithm in (plain, mixed, grpo)]
    distil, both, reward = (
        torch.autograd.grad(algorithm.loss(models, train).loss * len(train) / train.total, parameters)
        for algorithm, train in zip((plain, mixed, grpo), trains, strict=True)
    )
    for a, b, c in zip(distil, both, reward, strict=True):
        torch.testing.assert_close(b, a + 0.5 * c, rtol=1e-4, atol=1e-6)
        assert bool((c != 0).any())
    assert mixed.loss(models, trains[1]).metrics["replay/max_abs_dlogp"] == 0


def test_the_teacher_s_opinion_as_an_advantage_has_the_kl_s_gradient_on_average():
    """On the student's own weights: -E[(log p_T - log p_S) ∇log p_S] is ∇KL, over d because both are means."""
    settings = {"num_steps": 3, "window": {"kind": "fixed", "start": 1, "size": 1}, "kind": "dance", "noise_level": 1.0}
    dense, closed = opd(distillation="advantage", clip_range=10.0, **settings), opd(**settings)
    models = {"policy": LinearVelocity(0), "teacher:one": LinearVelocity(1)}
    spec = dense.rollout_plan(0, 0)
    rollout = make_rollout(models["policy"], spec, groups=2, size=20_000)
    parameters = list(models["policy"].parameters())
    with torch.no_grad():
        trains = [algorithm.prepare(rollout, None, models) for algorithm in (dense, closed)]
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
    windows = [algorithm.rollout_plan(i, 3).window for i in range(20)]
    assert windows == [algorithm.rollout_plan(i, 3).window for i in range(20)]
    assert len(set(windows)) > 1 and all(end - begin == 2 and end <= 5 for begin, end in windows)


def test_it_needs_scores_only_with_a_reward():
    assert not opd().needs_scores
    assert opd(reward_weight=1.0, group_size=4, **SDE).needs_scores
    assert two_teachers().models == ("policy", "teacher:place", "teacher:rest")


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
    rollout = with_tasks(make_rollout(LinearVelocity(), algorithm.rollout_plan(0, 0)))
    rollout = replace(rollout, condition=replace(condition(8), index_N=torch.arange(8)))
    train = algorithm.prepare(rollout, None, {"teacher:place": row, "teacher:rest": row})
    assert torch.equal(train.tensors["target"][:, 0, 0, 0], torch.arange(8.0).repeat_interleave(6))


def worker_config(student: Path, teachers: dict[str, dict[str, Any]], **changes: Any) -> AlignConfig:
    content = {
        "name": "distilled",
        "iterations": 2,
        "model": {"path": str(student), "max_sequence_length": 16},
        "data": {"groups_per_iteration": 6},
        "algorithm": {"type": "opd", "teachers": teachers, "num_steps": 3, **changes.pop("algorithm", {})},
        "rollout": {"chunk_size": 6},
        "learner": {"engine": "torch", "micro_batch_size": 6, "optimizer": {"learning_rate": 1e-3}},
        "cluster": {"backend": "local", "threads": 1},
        "evaluation": {"every": 0},
        "logging": {"wandb": "disabled"},
    }
    return AlignConfig.model_validate({**content, **changes})


def updates(config: AlignConfig, count: int = 1) -> list[Mapping[str, float]]:
    """Metrics of real updates on the student's own rollouts."""
    student, learner = RolloutWorker(config), LearnerWorker(config)
    sampler, algorithm = build_run(config, Path(".")).sampler, build_algorithm(config.algorithm)
    made = []
    try:
        for iteration in range(count):
            student.bind(learner.weights(), learner.version())
            rollout, _ = student.rollout(sampler.batch(iteration), algorithm.rollout_plan(iteration, 0), 0, iteration)
            made.append(learner.update(rollout, None, iteration).metrics)
    finally:
        learner.close()
    return made


def variant(pipeline: Path, directory: Path, part: str, file: str, **values: Any) -> Path:
    """A copy of a pipeline, with other values in a configuration file."""
    copy = Path(shutil.copytree(pipeline, directory))
    path = copy / part / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return copy


@pytest.mark.parametrize("kind", [{}, {"kind": "flow", "noise_level": 0.6}])
def test_a_teacher_with_another_schedule_is_asked_on_the_student_s(kind, tiny_pipeline_dir, tmp_path):
    """The student's own weights under a scheduler of another shift: not a bit of difference."""
    teacher = variant(tiny_pipeline_dir, tmp_path / "t", "scheduler", "scheduler_config.json", shift=5.0)
    metrics = updates(worker_config(tiny_pipeline_dir, {"shifted": {"path": str(teacher)}}, algorithm=kind))[0]
    assert metrics["loss/opd"] == 0 and metrics["loss/opd/shifted"] == 0 and metrics["grad_norm"] == 0


def test_a_deeper_teacher_teaches_a_student_of_one_block(tiny_pipeline_dir, tmp_path):
    from flowalign.shapes.build.pipeline import new_transformer

    teacher = Path(shutil.copytree(tiny_pipeline_dir, tmp_path / "deep"))
    torch.manual_seed(1)
    shutil.rmtree(teacher / "transformer")
    new_transformer(128, 128, num_layers=2, num_heads=1).save_pretrained(str(teacher / "transformer"))
    losses = [m["loss/opd"] for m in updates(worker_config(tiny_pipeline_dir, {"deep": {"path": str(teacher)}}), 8)]
    assert losses[0] > 0 and losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("kind", [{}, {"kind": "flow", "noise_level": 0.6}])
def test_a_deeper_wider_teacher_of_another_shift_is_asked_where_the_student_walked(kind, tiny_pipeline_dir, tmp_path):
    """The loss by hand, from the networks as diffusers loads them: both at the states and sigmas of the student."""
    from flowalign.shapes.build.pipeline import new_transformer

    teacher = variant(tiny_pipeline_dir, tmp_path / "t", "scheduler", "scheduler_config.json", shift=5.0)
    torch.manual_seed(1)
    shutil.rmtree(teacher / "transformer")
    new_transformer(128, 128, num_layers=2, num_heads=2).save_pretrained(str(teacher / "transformer"))
    algorithm = {**kind, "shift": 3.0}
    config = worker_config(tiny_pipeline_dir, {"other": {"path": str(teacher)}}, algorithm=algorithm)
    student, learner = RolloutWorker(config), LearnerWorker(config)
    student.bind(learner.weights(), 0)
    spec = build_algorithm(config.algorithm).rollout_plan(0, 0)
    rollout, _ = student.rollout(build_run(config, Path(".")).sampler.batch(0), spec, 0, 0)
    metrics = learner.update(rollout, None, 0).metrics
    learner.close()
    tokens, pooled = rollout.condition.expand()
    networks = [load_pipeline(directory).transformer for directory in (tiny_pipeline_dir, teacher)]
    expected = []
    for step in range(*spec.window):
        x, (sigma, sigma_next) = rollout.states_NSCHW[:, step], torch.tensor(spec.sigmas[step : step + 2])
        with torch.no_grad():
            velocities = [network(x, tokens, pooled, sigma.expand(6) * 1000).sample for network in networks]
        if not kind:
            expected.append(((sigma_next - sigma) * (velocities[0] - velocities[1])).square().mean() / 2)
            continue
        steps = [sde.reverse_step("flow", x, v, sigma, sigma_next, 0.6, spec.sigma_max) for v in velocities]
        normals = [torch.distributions.Normal(s.mean, s.std.expand_as(s.mean)) for s in steps]
        expected.append(torch.distributions.kl_divergence(*normals).mean())
    assert metrics["loss/opd"] == pytest.approx(float(sum(expected) / len(expected)), rel=1e-4)


def test_a_student_starts_from_what_another_run_exported(tiny_pipeline_dir, tmp_path):
    """Fine-tuning first, then distillation of its own start: the student is what was exported, to the bit."""
    tuned = worker_config(tiny_pipeline_dir, {}, name="tuned", iterations=1, runs_dir=str(tmp_path)).model_copy(
        update={
            "algorithm": {"type": "sft", "group_size": 2, "num_steps": 2, "timesteps": 2},
            "rewards": [RewardConfig(spec="geneval", options={"mode": "partial"})],
        }
    )
    run_dir = run_align(tuned, tmp_path, Console(quiet=True))
    start = export(run_dir, tmp_path / "start", config=tuned).path
    itself, base = ({"t": {"path": str(path)}} for path in (run_dir, tiny_pipeline_dir))
    assert updates(worker_config(start, itself))[0]["loss/opd"] == 0
    assert updates(worker_config(start, base))[0]["loss/opd"] > 0
    from_run = write_config(tmp_path)
    said = refusal(from_run, f"model.path={run_dir}")
    assert said.startswith(f"model.path: {run_dir} is a run or a checkpoint; ") and f"export {run_dir} --to" in said


def test_a_lora_of_another_base_is_refused_as_a_teacher_with_the_way_out(tiny_pipeline_dir, tmp_path):
    base = write_pipeline(tmp_path / "base")
    write_checkpoint(tmp_path / "run", run_config(base, lora=True))
    teachers = {"t": {"path": str(tmp_path / "run")}}
    lora = {"path": str(tiny_pipeline_dir), "max_sequence_length": 16, "lora": {"rank": 4, "alpha": 6}}
    with pytest.raises(ModelError, match=r"^algorithm.teachers.t: .*another base model.*flowalign export .*run --to"):
        LearnerWorker(worker_config(tiny_pipeline_dir, teachers, model=lora))


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


def test_a_teacher_with_latents_or_encoders_of_its_own_is_refused(tiny_pipeline_dir, tmp_path):
    small = variant(tiny_pipeline_dir, tmp_path / "small", "transformer", "config.json", sample_size=4)
    with pytest.raises(ModelError, match=r"algorithm.teachers.t: .* has latents of \(16, 4, 4\), the model's are"):
        LearnerWorker(worker_config(tiny_pipeline_dir, {"t": {"path": str(small)}}))
    other = variant(tiny_pipeline_dir, tmp_path / "scaled", "vae", "config.json", scaling_factor=2.0)
    with pytest.raises(ModelError, match="encodes prompts or images otherwise than the model"):
        LearnerWorker(worker_config(tiny_pipeline_dir, {"t": {"path": str(other)}}))


def test_a_run_without_a_reward_distils_evaluates_and_reports_no_reward(tiny_pipeline_dir, tmp_path):
    teacher = variant(tiny_pipeline_dir, tmp_path / "t", "scheduler", "scheduler_config.json", shift=5.0)
    changes = {"runs_dir": str(tmp_path), "evaluation": {"every": 2, "num_samples": 6, "num_steps": 2}}
    guided = {"t": {"path": str(teacher), "guidance_scale": 4.0}}
    run_dir = run_align(worker_config(tiny_pipeline_dir, guided, **changes), tmp_path, Console(quiet=True))
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert rows[1]["loss/opd"] > 0 and not any(key.startswith("reward/") for key in rows[1])
    assert any(key.startswith("eval/") for key in rows[2])


def refusal(config: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_align(config, overrides)
    return str(caught.value)


def test_teachers_are_checked_before_anything_starts(tmp_path):
    config = write_config(tmp_path)
    write_model_directory(tmp_path / "teacher")
    write_model_directory(tmp_path / "small")
    path = tmp_path / "small" / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": 4}))

    def taught(teachers: str, more: str = "") -> str:
        return f"algorithm={{type: opd, teachers: {{{teachers}}}{more}}}"

    loaded = load_align(config, [taught("t: {path: teacher}"), "rewards=[]"]).config
    assert loaded.algorithm["teachers"]["t"]["path"] == str(tmp_path / "teacher")
    assert loaded.algorithm["shift"] == 2.5
    assert refusal(config, "algorithm={type: opd}").startswith("algorithm.teachers: is missing; name one or more")
    assert "algorithm.teachers.t.path: " in refusal(config, taught("t: {path: absent}"))
    assert "has latents of (16, 4, 4), the model's are (16, 8, 8)" in refusal(config, taught("t: {path: small}"))
    assert "algorithm.teachers.t.weights" in refusal(config, taught("t: {path: teacher, weights: ema}"))
    assert "no teacher has the task 'single_object'" in refusal(config, taught("t: {path: teacher, tasks: [colors]}"))
    assert "algorithm.window" in refusal(config, taught("t: {path: teacher}", ", window: {kind: fixed, size: 0}"))
    said = refusal(config, taught("t: {path: teacher, guidance: 3}"))
    assert said == "algorithm.teachers.t.guidance: unknown key; did you mean guidance_scale?"
