"""Rewards that fail while a run trains: it goes on with the same bits, or stops before it has learnt from any of it."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from flowalign.config.alignment import AlignConfig
from flowalign.record import checkpoint
from flowalign.record.lock import RunLock
from flowalign.record.metrics import read_metrics, without_times
from flowalign.record.stop import StopRequest
from flowalign.run.drive import drive
from flowalign.run.fixed import build_run
from flowalign.run.journal import RunJournal
from flowalign.run.local import LocalBackend
from flowalign.run.loop import iterate
from flowalign.run.made import MadeOf
from flowalign.samples.scoring import ScorerHangs, TooManyInvalid
from rewards.http.transport import DeadlineExceeded
from rewards.interface import InvalidScores
from tests.fault.test_bad_input import said as said_of
from tests.rewards.conftest import Server

REWARD = """
import os, signal, time
from pathlib import Path

def bright(images, prompts, metadata, folder):
    scores = images.reshape(len(images), -1).mean(1) / 255.0
    order = Path(folder) / "order"
    if not order.exists():
        return scores
    calls, what = order.read_text().split()
    if int(calls):
        order.write_text(f"{int(calls) - 1} {what}")
        return scores
    order.unlink()
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        time.sleep(60)
    if what == "short":
        return scores[:-1]
    if what == "text":
        return ["bright"] * len(images)
    return [float(what)] * len(images)
"""


def order(folder: Path, what: str, *, after_calls: int) -> None:
    """What the reward does once, after so many chunks that it scored rightly."""
    (folder / "order").write_text(f"{after_calls} {what}")


def make_config(pipeline: Path, folder: Path, name: str, reward: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Two iterations of 8 samples in chunks of 4; more than half of them must be valid."""
    (folder / "reward.py").write_text(REWARD)
    return {
        "name": name,
        "runs_dir": str(folder / "runs"),
        "iterations": 2,
        "model": {"path": str(pipeline), "max_sequence_length": 16},
        "data": {"groups_per_iteration": 2},
        "algorithm": {"type": "flow_grpo", "group_size": 4, "num_steps": 4},
        "rewards": [{"name": "bright", **reward}],
        "rollout": {"chunk_size": 4},
        "learner": {"engine": "torch", "micro_batch_size": 8},
        "evaluation": {"every": 0},
        "checkpoint": {"every": 1},
        "cluster": {"backend": "local", "threads": 1},
        "logging": {"wandb": "disabled"},
        "min_valid_fraction": 0.6,
        **changes,
    }


def in_process(folder: Path) -> dict[str, Any]:
    return {"spec": f"{folder / 'reward.py'}:bright", "options": {"folder": str(folder)}}


@pytest.fixture
def serve(tmp_path) -> Iterator[Callable[..., Server]]:
    """A reward server of ``bright``, in a process of its own."""
    servers: list[Server] = []

    def start(port: int = 0) -> Server:
        (tmp_path / "reward.py").write_text(REWARD)
        servers.append(Server(f"{tmp_path / 'reward.py'}:bright", f"folder={tmp_path}", port=port))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def train(backend: LocalBackend, folder: Path, name: str) -> Path:
    """The backend's run with its journal; returns the run directory."""
    run_dir = folder / "runs" / name
    with RunLock.take(run_dir) as lock:
        begun = {"start": 0, "wall_s": 0.0, "made": MadeOf(backend.config, folder)}
        journal = RunJournal(backend.config, run_dir, Console(quiet=True), **begun, lock=lock, stop=StopRequest())
        lock.begun = True
        try:
            iterate(build_run(backend.config), backend, journal)
        finally:
            journal.close()
    return run_dir


def weights(backend: LocalBackend) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in backend.state()[0]["model"].items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.fault
def test_a_server_killed_over_a_batch_and_back_after_five_seconds_changes_no_bit(tmp_path, tiny_pipeline_dir, serve):
    server = serve()
    restarts = []

    def restart() -> None:
        server.process.wait()
        time.sleep(5)
        restarts.append(serve(server.port))

    restarting = threading.Thread(target=restart)
    restarting.start()
    rewards = {"whole": in_process(tmp_path), "broken": {"spec": f"url:{server.url}"}}
    rows, models, console = [], [], Console(file=io.StringIO())
    for name, reward in rewards.items():
        if name == "broken":
            order(tmp_path, "die", after_calls=3)
        config = make_config(tiny_pipeline_dir, tmp_path, name, reward)
        run_dir = drive(AlignConfig.model_validate(config), tmp_path, console)
        rows.append([without_times(row) for row in read_metrics(run_dir / "metrics.jsonl")])
        retries = [row.get("reward/bright/retries", -1) for row in read_metrics(run_dir / "metrics.jsonl")]
        assert retries == [-1, -1] if name == "whole" else retries[0] == 0 and retries[1] >= 1
        models.append(checkpoint.load(run_dir / "checkpoints" / "step_000002").model)
    restarting.join()
    assert len(restarts) == 1 and not (tmp_path / "order").exists()
    assert rows[0] == rows[1] and equal(*models)
    assert [row["reward/invalid_fraction"] for row in rows[1]] == [0, 0]
    lines = [line for line in console.file.getvalue().splitlines() if line.startswith("reward bright in ")]  # type: ignore[attr-defined]
    assert len(lines) == 1 and "in iteration 2: " in lines[0] and f"retries ({server.url}: " in lines[0]


@pytest.mark.fault
def test_a_server_that_stops_answering_ends_the_command_in_a_sentence_before_an_update(
    tmp_path, tiny_pipeline_dir, serve
):
    server = serve()
    order(tmp_path, "hang", after_calls=3)
    reward = {"spec": f"url:{server.url}", "options": {"deadline_s": 1.5}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(make_config(tiny_pipeline_dir, tmp_path, "hangs", reward)))
    sentence = said_of(tmp_path / "run.yaml", code=1)
    assert f"{server.url} did not answer within 1.5 s" in sentence and "raise deadline_s" in sentence
    run_dir = tmp_path / "runs" / "hangs"
    assert [row["iteration"] for row in read_metrics(run_dir / "metrics.jsonl")] == [1]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["latest", "step_000001"]


@pytest.mark.fault
def test_a_server_that_never_answers_leaves_the_parameters_as_they_were(tmp_path, tiny_pipeline_dir, serve):
    server = serve()
    reward = {"spec": f"url:{server.url}", "options": {"deadline_s": 1}}
    config = make_config(tiny_pipeline_dir, tmp_path, "silent", reward)
    backend = LocalBackend(AlignConfig.model_validate(config), tmp_path)
    before = weights(backend)
    os.kill(server.process.pid, signal.SIGSTOP)
    with pytest.raises(DeadlineExceeded, match="did not answer within 1 s"):
        train(backend, tmp_path, "silent")
    assert equal(before, weights(backend))
    backend.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scorers")


@pytest.fixture(scope="module")
def backend(folder, tiny_pipeline_dir) -> Iterator[LocalBackend]:
    cluster = {"backend": "local", "threads": 1, "reward_deadline_s": 1}
    config = make_config(tiny_pipeline_dir, folder, "scorers", in_process(folder), cluster=cluster)
    made = LocalBackend(AlignConfig.model_validate(config), folder)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("what", "error", "said"),
    [
        ("nan", TooManyInvalid, "only 50% of 8 samples .*bright/nan: 4.*nothing was updated"),
        ("inf", TooManyInvalid, "bright/inf: 4"),
        ("-inf", TooManyInvalid, "bright/inf: 4"),
        ("1e30", TooManyInvalid, "bright/magnitude: 4"),
        ("short", InvalidScores, r"'bright', score 'bright': shape \(3,\) for 4 images"),
        ("text", InvalidScores, "'bright', score 'bright': values of type"),
        ("hang", ScorerHangs, "'bright' did not score a chunk within 1 s"),
    ],
)
def test_a_refused_batch_leaves_the_parameters_bitwise_as_they_were(backend, folder, what, error, said):
    before = weights(backend)
    order(folder, what, after_calls=1)
    with pytest.raises(error, match=said):
        train(backend, folder, what)
    assert not (folder / "order").exists()
    assert equal(before, weights(backend))
    assert not (folder / "runs" / what / "metrics.jsonl").exists()
    assert not (folder / "runs" / what / "checkpoints" / "latest").exists()


def test_the_same_run_learns_where_no_batch_is_refused(backend, folder):
    before = weights(backend)
    run_dir = train(backend, folder, "good")
    assert not equal(before, weights(backend))
    assert [row["iteration"] for row in read_metrics(run_dir / "metrics.jsonl")] == [1, 2]
