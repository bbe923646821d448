"""A small training run on latents: two phases, two averages, validations and evaluations, and orders from files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.intake.file import load_pretrain
from flowalign.making.shapes_latents import make_bank
from flowalign.models.build import load_encoders
from flowalign.record import checkpoint
from flowalign.record.metrics import read_metrics, without_times
from tests.fault.test_kill_and_resume import REPO
from tests.tiny import encoded_here, merged

ITERATIONS = 12
# `slow`: a pause before each loss. `kill`: the rank dies where it learns from the iteration that the file names.
ALGORITHM = """
import os, signal, time
from pathlib import Path
import torch.distributed as dist
from flowalign.algorithms.rectified_flow import RectifiedFlow

HERE = Path(__file__).parent

class Ordered(RectifiedFlow):
    learned = 0
    def loss(self, models, minibatch):
        self.learned += 1
        if (HERE / "slow").exists():
            time.sleep(0.1)
        order = HERE / "kill"
        if order.exists() and self.learned > int(order.read_text()):
            if dist.get_rank() == dist.get_world_size() - 1:
                order.unlink(missing_ok=True)
                os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(models, minibatch)
"""
# `fail`: it raises. `die`: its process is killed.
REWARD = """
import os, signal
from pathlib import Path

HERE = Path(__file__).parent

def reward(images, prompts, metadata):
    if (HERE / "fail").exists():
        raise ValueError("the scale is missing")
    if (HERE / "die").exists():
        (HERE / "die").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return images.reshape(len(images), -1).mean(1) / 255.0
"""


def bank_of(pipeline: Path, folder: Path) -> Path:
    make_bank(load_encoders_of(pipeline), folder, num_images=40, batch=20)
    return folder


def load_encoders_of(pipeline: Path) -> Any:
    from flowalign.config.sections import ModelConfig

    return load_encoders(ModelConfig(path=str(pipeline), max_sequence_length=16))


def written(folder: Path, pipeline: Path, bank: Path, name: str = "base", **changes: Any) -> Path:
    """Write the configuration of a run, whose captions are encoded already; return its file."""
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(ALGORITHM)
    (folder / "bright.py").write_text(REWARD)
    phase = {"iterations": ITERATIONS // 2, "max_sequence_lengths": {4: 0.5, 16: 0.5}}
    content = {
        "name": name,
        "runs_dir": str(folder / "runs"),
        "model": {"path": str(pipeline), "max_sequence_length": 16},
        "latents": str(bank),
        "algorithm": {"type": f"{folder / 'own.py'}:Ordered"},
        "phases": [{**phase, "learning_rate": 1e-3}, {**phase, "learning_rate": 1e-3, "final_learning_rate": 1e-4}],
        "learner": {
            "batch_size": 8,
            "micro_batch_size": 4,
            "dtype": "float32",
            "ema_decay": [0.9, 0.5],
            "optimizer": {"warmup_steps": 2, "eps": 1e-5},
        },
        "cluster": {"threads": 1, "rollout_cpus": 0.25, "reward_cpus": 0.25, "learner_cpus": 0.25},
        "validation": {"latents": str(bank), "every": 3, "num_samples": 6, "num_times": 3},
        "evaluation": {"every": 4, "num_samples": 5, "num_steps": 3, "scorer": f"{folder / 'bright.py'}:reward"},
        "rollout": {"chunk_size": 2},
        "checkpoint": {"every": 2, "keep_last": 20},
        "logging": {"every": 1},
    }
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(merged(content, changes)))
    encoded_here(load_pretrain(config).config)
    return config


def here(config: Path, *more: str, code: int = 0) -> str:
    """Return what the command says in this process, where nobody kills it."""
    ended = CliRunner().invoke(app, ["pretrain", str(config), *more])
    assert ended.exit_code == code and "Traceback" not in ended.output, ended.output
    return " ".join(ended.output.split())


def start(config: Path, *more: str, processes: int = 1) -> subprocess.Popen[bytes]:
    """Start the command in a session of its own, under torchrun where it is several ``processes``."""
    log = config.with_suffix(".log").open("ab")
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*(torchrun if processes > 1 else ()), "-m", "flowalign.cli", "pretrain", str(config), *more]
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=REPO,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def assert_same_training(one: Path, other: Path, step: int = ITERATIONS, rows_from: int = 0) -> None:
    """Assert the same bits of weights, averages, moments and samples, and rows that differ in their times alone."""
    a, b = (checkpoint.load(run / "checkpoints" / f"step_{step:06d}") for run in (one, other))
    assert a.ema is not None and b.ema is not None and a.averages.keys() == b.averages.keys() == {"ema_0.5"}
    assert a.optimizer_by_rank.keys() == b.optimizer_by_rank.keys()
    pairs = [(a.model, b.model), (a.ema, b.ema), (a.averages["ema_0.5"], b.averages["ema_0.5"])]
    pairs += [(a.optimizer_of(rank)[0], b.optimizer_of(rank)[0]) for rank in a.optimizer_by_rank]
    for left, right in pairs:
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    rows = [[plain(row) for row in read_metrics(run / "metrics.jsonl")] for run in (one, other)]
    assert rows[0] == rows[1] and [row["iteration"] for row in rows[0]] == list(range(rows_from, step + 1))
    assert samples_of(one) == samples_of(other) and len(samples_of(one)) == (0 if rows_from else 4 * 6)


def assert_close(one: Path, other: Path, step: int = ITERATIONS, atol: float = 1e-6) -> None:
    a, b = (checkpoint.load(run / "checkpoints" / f"step_{step:06d}") for run in (one, other))
    assert a.ema is not None and b.ema is not None
    for left, right in ((a.model, b.model), (a.ema, b.ema), (a.averages["ema_0.5"], b.averages["ema_0.5"])):
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            torch.testing.assert_close(right[name], tensor, rtol=0, atol=atol)


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without what differs between equal runs, and without the count of restarts."""
    return {key: value for key, value in without_times(row).items() if key != "learner/restarts"}


def samples_of(run: Path) -> dict[str, bytes]:
    files = (path for path in (run / "samples").glob("iteration_*/*"))
    return {str(path.relative_to(run)): path.read_bytes() for path in files}
