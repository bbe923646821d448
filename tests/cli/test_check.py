"""``flowalign check`` and ``--dry-run``: what would run, and the refusals of the commands that run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flowalign.cli import app
from flowalign.intake.file import load_align
from flowalign.intake.run_directory import begin_run
from flowalign.record.lock import RunLock
from tests.tiny import write_config, write_configs_of_a_pipeline

ROOT = Path(__file__).resolve().parents[2]
SUITE = (
    *("intake", "config", "cli/test_cli.py", "data/test_preferences.py", "rewards/test_reward_needs.py"),
    *("fault/test_bad_input.py", "fault/test_refused_runs.py", "fault/test_bad_directories.py"),
    *("fault/test_wrong_kinds.py", "fault/test_changed_ingredients.py", "fault/test_pasted_advice.py"),
    *("run/test_made.py", "run/test_moved_runs.py", "run/test_sizes.py", "run/test_text_encoders.py"),
    *("run/test_pretrain.py", "models/test_pipeline_walk.py", "models/test_attention.py"),
    *("families/test_guidance_keys.py", "families/test_adapters.py", "families/test_cache.py"),
    *("families/test_qwen_image.py", "families/test_recipes.py", "algorithms/test_opd_teachers.py"),
    *("algorithms/test_direct_reward.py", "algorithms/test_algorithm_contract.py"),
)


def invoked(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def sentence(done: Result) -> str:
    return next((line for line in done.stderr.splitlines() if line.startswith("error: ")), "")


@pytest.fixture
def config(tmp_path: Path, tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose model has its weights, in an empty working directory."""
    os.symlink(tiny_pipeline_dir, tmp_path / "model")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return write_config(tmp_path)


def test_what_would_run_is_said_and_nothing_is_left_behind(config: Path) -> None:
    shown = invoked("check", config, "learner.epochs=2")
    assert shown.exit_code == 0, shown.output
    said = " ".join(shown.stdout.split())
    for words in (
        "overrides: learner.epochs → 2",
        "run directory: runs/tiny, begun anew",
        "prompts: 1113 of shapes:train, 3 groups of 4 images an iteration",
        "command align, 4 iterations, begins anew",
        "(Stable Diffusion 3), 64x64 pixels, float32",
        "flow_grpo, 3 groups of 4, 12 images an iteration, 10 steps, 2 of them with noise",
        "rewards geneval (weight 1)",
        "in micro-batches of 8, learning rate 0.0001; torch, 1 rank",
        "every 20 iterations: 300 samples, 10 steps of euler, guidance 1",
        "cpu, this process without Ray",
        "memory a process",
        "writes runs/tiny, at most",
        f"ready: flowalign align {config} learner.epochs=2",
    ):
        assert words in said
    assert not list(Path().iterdir())


def test_a_dry_run_says_the_same_and_stops_there(config: Path) -> None:
    checked, dry = invoked("check", config), invoked("align", config, "--dry-run")
    assert (checked.exit_code, dry.exit_code) == (0, 0)
    assert checked.stdout.splitlines()[1:] == dry.stdout.splitlines()[1:]
    assert not list(Path().iterdir())


def test_a_program_is_told_what_would_run_and_why_not(config: Path) -> None:
    found = json.loads(invoked("check", config, "--json").stdout)
    assert found["ready"] and found["command"] == "align" and found["samples"] == 12 and found["done"] == 0
    assert found["memory"][0]["name"] == "process" and found["memory"][0]["bytes"] > 0
    assert found["model"]["parameters"] == found["model"]["trained"] > 0
    wrong = invoked("check", config, "learner.epoch=2", "--json")
    assert wrong.exit_code == 2
    assert json.loads(wrong.stdout) == {
        "ready": False,
        "reason": "learner.epoch: unknown key; did you mean learner.epochs?",
        "said": [],
    }


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["learner.micro_batchsize=8"], "learner.micro_batchsize: unknown key"),
        (["model.path=absent"], "model.path: "),
        (["model.path=weightless"], "weightless/transformer has no weights (*.safetensors)"),
        (["data.prompts=absent.jsonl"], "data.prompts: "),
        (["rewards.0.spec=absent.py:reward"], "absent.py does not exist"),
        (["runs_dir=model_index"], "runs_dir: model_index/tiny cannot be written"),
        (["name=held"], "runs/held is held by process"),
        (["name=begun", "seed=3"], "seed: runs/begun was begun with 0 and cannot go on with 3"),
        (["name=begun"], "runs/begun/checkpoints"),
    ],
)
def test_both_refuse_with_the_same_sentence_before_anything_starts(
    config: Path, overrides: list[str], said: str
) -> None:
    write_configs_of_a_pipeline(Path("weightless"))
    Path("model_index").write_text("a file")
    (begin_run(load_align(config, ["name=begun"]).config) / "checkpoints" / "step_000001").mkdir(parents=True)
    Path("runs/begun/checkpoints/latest").write_text("step_000001\n")
    with RunLock.take(Path("runs/held")):
        before = sorted(Path().rglob("*"))
        refused = [invoked(command, config, *overrides) for command in ("align", "check")]
        assert [done.exit_code for done in refused] == [2, 2]
        assert sentence(refused[0]) == sentence(refused[1]) and said in sentence(refused[0])
        assert sorted(Path().rglob("*")) == before


def test_a_run_that_is_finished_has_nothing_left_to_do(config: Path) -> None:
    assert invoked("align", config, "iterations=1", "evaluation.every=0", "logging.wandb=disabled").exit_code == 0
    shown = invoked("check", config, "iterations=1", "evaluation.every=0", "logging.wandb=disabled")
    assert shown.exit_code == 0 and "has done all 1 iterations already; raise `iterations`" in shown.stdout
    shown = invoked("check", config, "evaluation.every=0", "logging.wandb=disabled")
    assert shown.exit_code == 0 and "align, 4 iterations, goes on after iteration 1" in " ".join(shown.stdout.split())
    shutil.rmtree("runs/tiny/checkpoints/step_000001")
    shown = invoked("check", config, "evaluation.every=0", "logging.wandb=disabled")
    assert shown.exit_code == 2 and "runs/tiny/checkpoints" in sentence(shown)


def test_the_command_is_told_by_the_keys_or_by_as(config: Path) -> None:
    for word in ("pretrain", "distill"):
        assert "rewards: belongs to an alignment" in sentence(invoked("check", config, "--as", word))
    training = config.with_name("training.yaml")
    training.write_text("name: a\niterations: 2\nmodel: {path: model}\nlatents: bank\nalgorithm: {type: reflow}\n")
    for words in (["check", training], ["pretrain", training], ["check", training, "--as", "pretrain"]):
        assert "latents: " in (said := sentence(invoked(*words))) and "holds no latents" in said
    assert "algorithm.type: reflow learns from no teacher" in sentence(invoked("check", training, "--as", "distill"))
    assert "belongs to a training run on latents" in sentence(invoked("check", training, "--as", "align"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_check_refuses_all_that_the_suite_sees_refused(tmp_path: Path) -> None:
    """`tests.cli.both` puts each wrong configuration of the suite to both commands, where and as its test has it."""
    environment = {**os.environ, "REFUSED_BY_BOTH": str(tmp_path / "found.json"), "PYTHONPATH": str(ROOT)}
    files = [str(ROOT / "tests" / name) for name in SUITE]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "tests.cli.both", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["differences"] == [] and len(found["asked"]) > 1500
