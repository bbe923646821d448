"""Distillation with real pipelines as teachers."""

import io
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flowalign.algorithms import build_algorithm
from flowalign.cli import app
from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.config.sections import RewardConfig
from flowalign.export import export
from flowalign.export.verify import load_pipeline
from flowalign.flow import sde
from flowalign.intake.check_teachers import check_runs_that_teach
from flowalign.intake.file import load_align
from flowalign.intake.resolved import write_resolved
from flowalign.models.errors import ModelError
from flowalign.record.metrics import read_metrics
from flowalign.report import write_report
from flowalign.run.collecting import Request
from flowalign.run.drive import drive
from flowalign.run.fixed import build_run
from flowalign.run.workers import LearnerWorker, RolloutWorker
from tests.algorithms.every import plan_of
from tests.tiny import run_config, write_checkpoint, write_config, write_configs_of_a_pipeline, write_pipeline


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
    sampler, algorithm = build_run(config).sampler, build_algorithm(config.algorithm)
    made = []
    try:
        for iteration in range(count):
            student.bind(learner.weights(), learner.version())
            asked = Request(sampler.batch(iteration), plan_of(algorithm, iteration), 0, iteration)
            _, rollout, _ = student.rollout(asked)
            made.append(learner.update([rollout], None, iteration).metrics)
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
    plan = plan_of(build_algorithm(config.algorithm))
    _, rollout, _ = student.rollout(Request(build_run(config).sampler.batch(0), plan, 0, 0))
    metrics = learner.update([rollout], None, 0).metrics
    learner.close()
    tokens, pooled = rollout.condition.take(torch.arange(len(rollout))).expand().values()
    networks = [load_pipeline(directory).transformer for directory in (tiny_pipeline_dir, teacher)]
    expected = []
    for step in range(*plan.noise.window):
        x, (sigma, sigma_next) = rollout.states_NSCHW[:, step], torch.tensor(plan.sigmas[step : step + 2])
        with torch.no_grad():
            velocities = [network(x, tokens, pooled, sigma.expand(6) * 1000).sample for network in networks]
        if not kind:
            expected.append(((sigma_next - sigma) * (velocities[0] - velocities[1])).square().mean() / 2)
            continue
        steps = [sde.reverse_step("flow", x, v, sigma, sigma_next, 0.6, plan.sigma_max) for v in velocities]
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
    run_dir = drive(tuned, tmp_path, Console(quiet=True))
    start = export(run_dir, tmp_path / "start", config=tuned).path
    itself, base = ({"t": {"path": str(path)}} for path in (run_dir, tiny_pipeline_dir))
    assert updates(worker_config(start, itself))[0]["loss/opd"] == 0
    assert updates(worker_config(start, base))[0]["loss/opd"] > 0
    from_run = write_config(tmp_path)
    taught = f"algorithm={{type: opd, num_steps: 2, teachers: {{t: {{path: {run_dir}}}}}}}"
    other = Path(shutil.copytree(tiny_pipeline_dir, tmp_path / "other"))
    vae = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 0.1 for name, value in load_file(vae).items()}, vae, {"format": "pt"})
    for base in (None, tiny_pipeline_dir, other):  # unknown, as it was, and changed since
        if base is not None:
            model = tuned.model.model_copy(update={"path": str(base)})
            write_resolved(tuned.model_copy(update={"model": model}), run_dir)
        check_runs_that_teach(load_align(from_run, [taught, f"model.path={tiny_pipeline_dir}", "rewards=[]"]).config)
        if base != other:  # whose encoders are those of `start`, saved anew
            check_runs_that_teach(load_align(from_run, [taught, f"model.path={start}", "rewards=[]"]).config)
        shown = CliRunner().invoke(app, ["align", str(from_run), taught, f"model.path={other}", "rewards=[]"])
        said = f"error: algorithm.teachers.t.path: {run_dir} learned with other text encoders or another autoencoder"
        assert shown.exit_code == 2 and said in " ".join(shown.stderr.split())
    said = refusal(from_run, f"model.path={run_dir}")
    assert said.startswith(f"model.path: {run_dir} is a run or a checkpoint; ") and f"export {run_dir} --to" in said


def test_a_lora_of_another_base_is_refused_as_a_teacher_with_the_way_out(tiny_pipeline_dir, tmp_path):
    base = write_pipeline(tmp_path / "base")
    write_checkpoint(tmp_path / "run", run_config(base, lora=True))
    teachers = {"t": {"path": str(tmp_path / "run")}}
    lora = {"path": str(tiny_pipeline_dir), "max_sequence_length": 16, "lora": {"rank": 4, "alpha": 6}}
    with pytest.raises(ModelError, match=r"^algorithm.teachers.t: .*another base model.*flowalign export .*run --to"):
        LearnerWorker(worker_config(tiny_pipeline_dir, teachers, model=lora))


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
    config, said = worker_config(tiny_pipeline_dir, guided, **changes), io.StringIO()
    run_dir = drive(config, tmp_path, Console(file=said))
    assert re.search(r"iteration 2/2  loss [\d.e-]+  ", said.getvalue())
    page = write_report(run_dir, config, {}).read_text()
    assert "Losses while training" in page and "No iteration has finished" not in page and "and scored" not in page
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
    write_configs_of_a_pipeline(tmp_path / "teacher")
    write_configs_of_a_pipeline(tmp_path / "small")
    path = tmp_path / "small" / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": 4}))

    def taught(teachers: str, more: str = "") -> str:
        return f"algorithm={{type: opd, teachers: {{{teachers}}}{more}}}"

    loaded = load_align(config, [taught("t: {path: teacher}"), "rewards=[]"]).config
    assert loaded.algorithm["teachers"]["t"]["path"] == str(tmp_path / "teacher")
    assert loaded.algorithm["shift"] == 2.5
    asked = "algorithm.teachers: is missing; write such as {better: {path: runs/better}}"
    assert refusal(config, "algorithm={type: opd}") == asked
    assert "algorithm.teachers.t.path: " in refusal(config, taught("t: {path: absent}"))
    assert "has latents of (16, 4, 4), the model's are (16, 8, 8)" in refusal(config, taught("t: {path: small}"))
    assert "algorithm.teachers.t.weights" in refusal(config, taught("t: {path: teacher, weights: ema}"))
    assert "no teacher has the task 'single_object'" in refusal(config, taught("t: {path: teacher, tasks: [colors]}"))
    assert "algorithm.window" in refusal(config, taught("t: {path: teacher}", ", window: {kind: fixed, size: 0}"))
    said = refusal(config, taught("t: {path: teacher, guidance: 3}"))
    assert said == "algorithm.teachers.t.guidance: unknown key; did you mean algorithm.teachers.t.guidance_scale?"
