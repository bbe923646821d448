"""What the process of a run says at its end, by real processes: each code of docs/stopping.md's table."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flowalign.cli import app
from flowalign.cli.exits import ExitCode
from flowalign.record.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
name: t
iterations: 200
model: {path: shapes, dtype: float32, max_sequence_length: 2}
data: {prompts: "shapes:train", groups_per_iteration: 2}
algorithm: {type: flow_grpo, group_size: 2, num_steps: 4, window: {kind: random, size: 2, start: 0, stop: 3}}
rewards: [{spec: geneval}]
rollout: {chunk_size: 4, decode_batch_size: 4}
learner: {engine: torch, micro_batch_size: 4}
cluster: {backend: local, threads: 1}
evaluation: {every: 0}
checkpoint: {every: 100}
logging: {wandb: disabled}
"""


def start(folder: Path, *overrides: str, command: str = "align") -> subprocess.Popen[str]:
    (folder / "t.yaml").write_text(CONFIG)
    arguments = [str(folder / "t.yaml"), f"runs_dir={folder / 'runs'}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "flowalign.cli", command, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(line, cwd=folder, env=environment, **pipes)  # type: ignore[call-overload]


def here(*words: str) -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, list(words))


def done(folder: Path) -> int:
    path = folder / "runs" / "t" / "metrics.jsonl"
    return max((row["iteration"] for row in read_metrics(path)), default=0) if path.exists() else 0


def wait_for(process: subprocess.Popen[str], folder: Path, iteration: int) -> None:
    deadline = time.monotonic() + 200
    while done(folder) < iteration and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert done(folder) >= iteration, process.communicate()[0]


@pytest.mark.fault
def test_a_second_run_is_refused_and_the_first_ends_when_it_is_asked(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "t"
    first = start(tmp_path)
    wait_for(first, tmp_path, 1)
    before = (run_dir / "config.yaml").read_bytes()
    second = here("align", str(tmp_path / "t.yaml"), f"runs_dir={tmp_path / 'runs'}", "iterations=300")
    assert second.exit_code == ExitCode.REFUSED and f"held by process {first.pid} on" in " ".join(second.stderr.split())
    assert (run_dir / "config.yaml").read_bytes() == before
    asked = here("stop", str(run_dir), "--json")
    assert asked.exit_code == 0 and json.loads(asked.stdout)["holder"]["process"]["pid"] == first.pid
    said = first.communicate(timeout=120)[0]
    assert first.returncode == ExitCode.EARLY and "the same command continues it from" in said
    last = run_dir / "checkpoints" / f"step_{done(tmp_path):06d}"
    assert f"run: {run_dir}\ncheckpoint: {last}\nmetrics: {run_dir / 'metrics.jsonl'}\ntook: start " in said
    assert (run_dir / "checkpoints" / f"step_{done(tmp_path):06d}").is_dir()
    assert [row["iteration"] for row in read_metrics(run_dir / "metrics.jsonl")] == list(range(1, done(tmp_path) + 1))
    assert not (run_dir / "lock").exists() and not (run_dir / "stop").exists()
    again = here("stop", str(run_dir), "--json")
    assert again.exit_code == ExitCode.REFUSED and "held by nobody" in again.stderr


@pytest.mark.slow
@pytest.mark.fault
def test_a_signal_while_the_model_loads_leaves_nothing(tmp_path: Path) -> None:
    process = start(tmp_path)
    assert process.stdout is not None
    while "run directory" not in (line := process.stdout.readline()):
        assert line
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == ExitCode.EARLY and re.search(
        r"^stopped before the first iteration\ntook: start .*\n\Z", said, re.MULTILINE
    ), said
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.fault
def test_every_code_of_the_table_is_what_a_process_ends_with(tmp_path: Path) -> None:
    table = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "stopping.md").read_text(), re.MULTILINE)
    assert [int(code) for code in table] == sorted(ExitCode)
    (tmp_path / "broken.py").write_text(
        "calls = []\n\n\ndef reward(images, prompts, metadata):\n    calls.append(1)\n"
        "    if len(calls) > 2:\n        raise ValueError('the scale is missing')\n    return [0.5] * len(images)\n"
    )
    ended = {}
    process = start(tmp_path, "iterations=1")
    process.communicate(timeout=200)
    ended[process.returncode] = "finished"
    process = start(tmp_path, "name=f", "checkpoint.every=1", "rewards=[{spec: 'broken.py:reward'}]")
    said = process.communicate(timeout=200)[0]
    ended[process.returncode] = "failed"
    assert "the scale is missing" in said and "the last checkpoint is" in said and "step_000002" in said
    process = start(tmp_path, "learner.epochs=none")
    process.communicate(timeout=200)
    ended[process.returncode] = "refused"
    alarm = "safety={window: 3, patience: 1, stop: true, min_diversity: 0.99}"
    process = start(tmp_path, "name=a", alarm, "data.groups_per_iteration=4")
    said = process.communicate(timeout=280)[0]
    ended[process.returncode] = "alarm"
    for signals, name in (([signal.SIGUSR1], "early"), ([signal.SIGINT] * 2, "at once")):
        process = start(tmp_path, "iterations=500")
        wait_for(process, tmp_path, done(tmp_path) + 1)
        for number in signals:
            process.send_signal(number)
            time.sleep(0.02)
        said += process.communicate(timeout=100)[0]
        ended[process.returncode] = name
    assert re.search(r"error: stopped at once; the same command continues it from \S+step_\d+, and \d+ finished", said)
    expected = {0: "finished", 1: "failed", 2: "refused", 3: "alarm", 75: "early", 130: "at once"}
    assert ended == expected, said


@pytest.mark.fault
@pytest.mark.slow
def test_the_tee_behind_a_run_may_die_of_the_same_ctrl_c(tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for(process, tmp_path, 1)
    assert process.stdout is not None
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == ExitCode.EARLY
    assert (tmp_path / "runs" / "t" / "checkpoints" / "latest").is_file()
