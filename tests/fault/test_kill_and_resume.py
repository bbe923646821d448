"""A run killed at random moments and started again ends with the bits of the uninterrupted run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.record import checkpoint
from flowalign.record.metrics import read_metrics, without_times

REPO = Path(__file__).resolve().parents[2]
CONFIG = """
name: {name}
runs_dir: {runs}
iterations: 8
model: {{path: {model}, max_sequence_length: 16}}
data: {{groups_per_iteration: 3}}
algorithm: {{type: flow_grpo, group_size: 4, num_steps: 4, window: {{kind: random, size: 2, stop: 3}}}}
rewards: [{{spec: "{reward}"}}]
rollout: {{chunk_size: 6}}
learner: {{engine: {engine}, micro_batch_size: 6, ema_decay: 0.9, optimizer: {{learning_rate: 1.0e-3}}}}
cluster: {{backend: {backend}, threads: 1, rollout_cpus: 0.5, reward_cpus: 0.25, learner_cpus: 0.25}}
evaluation: {{every: 4, num_samples: 12, num_steps: 4}}
checkpoint: {{every: 2, keep_last: 10}}
logging: {{wandb: disabled}}
"""
REWARD = "def reward(images, prompts, metadata):\n    return images.reshape(len(images), -1).mean(1) / 255.0\n"


def written(tmp_path: Path, model: Path, name: str, backend: str, reward: str = REWARD) -> Path:
    """The configuration of a run: with DeepSpeed on Ray, with torch, which is faster to load, without."""
    (tmp_path / "bright.py").write_text(reward)
    config, engine = tmp_path / f"{name}.yaml", "deepspeed" if backend == "ray" else "torch"
    named = {"name": name, "runs": tmp_path / "runs", "model": model, "reward": tmp_path / "bright.py:reward"}
    config.write_text(CONFIG.format(**named, backend=backend, engine=engine))
    return config


def start(
    tmp_path: Path, model: Path, name: str, backend: str, *more: str, reward: str = REWARD
) -> subprocess.Popen[bytes]:
    config = written(tmp_path, model, name, backend, reward)
    log = (tmp_path / f"{name}.log").open("ab")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "flowalign.cli", "align", str(config), *more]
    return subprocess.Popen(
        command, cwd=REPO, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def iterations_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return max((row["iteration"] for row in read_metrics(path)), default=-1) if path.exists() else -1


def kill_after(process: subprocess.Popen[bytes], run_dir: Path, iteration: int, delay: float) -> None:
    """SIGKILL the run and all its children a random while after an iteration was written."""
    deadline = time.monotonic() + 240
    while iterations_done(run_dir) < iteration and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def here(config: Path, *more: str, code: int = 0) -> str:
    """What the command says in this process, where nobody kills it."""
    ended = CliRunner().invoke(app, ["align", str(config), *more])
    assert ended.exit_code == code and "Traceback" not in ended.output, ended.output
    return " ".join(ended.output.split())


def finished(process: subprocess.Popen[bytes], log: Path) -> None:
    assert process.wait(timeout=280) == 0, log.read_text()[-3000:]


def assert_same_run(one: Path, other: Path, iterations: int = 8) -> None:
    a, b = (checkpoint.load(run / "checkpoints" / f"step_{iterations:06d}") for run in (one, other))
    assert a.ema is not None and b.ema is not None
    for left, right in ((a.model, b.model), (a.ema, b.ema), (a.optimizer_of(0)[0], b.optimizer_of(0)[0])):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    rows = [[without_times(row) for row in read_metrics(run / "metrics.jsonl")] for run in (one, other)]
    assert rows[0] == rows[1]
    assert [row["iteration"] for row in rows[0]] == list(range(iterations + 1))
    assert all(row["replay/max_abs_dlogp"] == 0 for row in rows[0][1:])


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("backend", ["local", "ray"])
def test_three_sigkills_at_random_moments_change_no_bit(tmp_path, tiny_pipeline_dir, backend):
    chance = random.Random()
    seed = chance.randrange(10**6)
    chance.seed(seed)
    print(f"kill moments from seed {seed}")
    here(written(tmp_path, tiny_pipeline_dir, "whole", backend))
    run_dir = tmp_path / "runs" / "killed"
    for iteration in sorted(chance.sample(range(1, 8), 3)):
        process = start(tmp_path, tiny_pipeline_dir, "killed", backend)
        kill_after(process, run_dir, iteration, chance.random())
    here(written(tmp_path, tiny_pipeline_dir, "killed", backend))
    assert_same_run(tmp_path / "runs" / "whole", run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("ray", "local"), ("local", "ray")])
def test_the_command_goes_on_with_the_other_backend_and_changes_no_bit(tmp_path, tiny_pipeline_dir, kinds):
    here(written(tmp_path, tiny_pipeline_dir, "whole", "ray"))
    config = written(tmp_path, tiny_pipeline_dir, "changed", "ray")
    for kind, iterations in zip(kinds, (4, 8), strict=True):
        here(config, f"cluster.backend={kind}", f"iterations={iterations}")
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "changed")


@pytest.mark.slow
@pytest.mark.fault
def test_a_killed_run_whose_reward_was_turned_ends_with_2_and_says_how_to_go_on_all_the_same(
    tmp_path, tiny_pipeline_dir
):
    run_dir, turned = tmp_path / "runs" / "turned", REWARD.replace("return ", "return -")
    kill_after(start(tmp_path, tiny_pipeline_dir, "turned", "local"), run_dir, 3, 0.0)
    before = (run_dir / "metrics.jsonl").read_bytes()
    config = written(tmp_path, tiny_pipeline_dir, "turned", "local", turned)
    said = here(config, code=2)
    assert f"error: rewards.0.spec: {tmp_path / 'bright.py'} has changed since step_00000" in said
    assert "--accept-changed rewards.0.spec" in said
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    here(config, "--accept-changed", "rewards.0.spec")
    means = [row["reward/total/mean"] for row in read_metrics(run_dir / "metrics.jsonl")[1:]]
    assert means[0] > 0 > means[-1]


@pytest.mark.slow
@pytest.mark.fault
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path, tiny_pipeline_dir):
    process = start(tmp_path, tiny_pipeline_dir, "stopped", "local")
    run_dir = tmp_path / "runs" / "stopped"
    deadline = time.monotonic() + 240
    while iterations_done(run_dir) < 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=120)
    said = (tmp_path / "stopped.log").read_text()
    saved = checkpoint.latest(run_dir / "checkpoints")
    assert saved is not None and saved.name == f"step_{iterations_done(run_dir):06d}"
    assert "continues" in said and "Traceback" not in said
