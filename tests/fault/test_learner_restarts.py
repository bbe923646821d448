"""Learner ranks that are killed or stopped in mid-run: the run goes back by itself and changes no bit."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from flowalign.cluster import ray_backend
from flowalign.cluster.ray_backend import RayBackend
from flowalign.record import checkpoint
from flowalign.record.metrics import read_metrics
from tests.fault.test_kill_and_resume import assert_same_run, here, iterations_done, start, written
from tests.fault.test_lost_ray import nothing_stays, own_folder_of, part_of_ray, whole

pytestmark = pytest.mark.fault
Strike = Callable[[RayBackend], None]


def kill(rank: int = 0, number: int = signal.SIGKILL, after_s: float = 0.0) -> Strike:
    def strike(backend: RayBackend) -> None:
        pid = backend.learner.pids[rank]
        if after_s:
            threading.Timer(after_s, os.kill, (pid, number)).start()
        else:
            os.kill(pid, number)

    return strike


class Struck(RayBackend):
    """A backend that is struck as it begins to collect iterations ``before``, counted from 1, each time that it does.

    ``pids`` has the ranks' processes of every start.
    """

    before: ClassVar[dict[int, list[Strike]]]
    pids: ClassVar[list[int]]

    def collect(self, batch: Any, *args: Any, evaluation: bool = False, **options: Any) -> Any:
        self.pids.extend(pid for pid in self.learner.pids if pid not in self.pids)
        strikes = [] if evaluation else self.before.get(1 + batch.sample_ids[0] // len(batch), [])
        if strikes:
            strikes.pop(0)(self)
        return super().collect(batch, *args, evaluation=evaluation, **options)


def struck(before: dict[int, list[Strike]]) -> type[Struck]:
    return type("Struck", (Struck,), {"before": before, "pids": []})


def configured(tmp_path: Path, pipeline: Path, name: str, iterations: int, *, ranks: int = 1) -> Path:
    config = written(tmp_path, pipeline, name, "ray")
    text = config.read_text().replace("iterations: 8", f"iterations: {iterations}")
    config.write_text(text.replace("learner: {", f"learner: {{ranks: {ranks}, "))
    return config


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ranks_killed_at_random_moments_of_five_iterations_change_no_bit(
    tmp_path: Path, tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random()
    seed = chance.randrange(10**6)
    chance.seed(seed)
    print(f"kill moments from seed {seed}")
    here(configured(tmp_path, tiny_pipeline_dir, "whole", 14, ranks=2))
    rows = read_metrics(tmp_path / "runs" / "whole" / "metrics.jsonl")
    took_s = min(row["time/iteration_s"] for row in rows[2:])
    apart = sorted(chance.sample(range(1, 10), 5))  # a kill that comes late does not fall into another's iteration
    strikes = {at + i: [kill(chance.randrange(2), after_s=chance.uniform(0, took_s))] for i, at in enumerate(apart)}
    monkeypatch.setattr(ray_backend, "RayBackend", struck(strikes))
    config = configured(tmp_path, tiny_pipeline_dir, "killed", 14, ranks=2)
    said = here(config, "cluster.max_restarts=5", "cluster.restart_wait_s=0.2")
    assert said.count("restarted: the learner (rank ") == 5 and "(5 of at most 5 times)" in said, said
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "killed", 14)
    assert read_metrics(tmp_path / "runs" / "killed" / "metrics.jsonl")[-1]["learner/restarts"] == 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_rank_stopped_before_the_first_checkpoint_is_ended_and_all_begins_again(
    tmp_path: Path, tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole(tmp_path, tiny_pipeline_dir)
    backend = struck({2: [kill(number=signal.SIGSTOP)]})
    monkeypatch.setattr(ray_backend, "RayBackend", backend)
    config = written(tmp_path, tiny_pipeline_dir, "stopped", "ray")
    patience = "cluster.patience={first_s: 300, least_s: 12, factor: 5}"
    said = here(config, patience, "cluster.restart_wait_s=0", "logging.wandb=offline")
    assert "restarted: the learner (rank 0 of 1) was ended: it did not answer for " in said, said
    assert "since its process is stopped; all its ranks begin again in 0.0 s from the beginning, since there is" in said
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "stopped")
    assert len(backend.pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in backend.pids)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("strikes", "ends"),
    [
        ({3: 1, 5: 1, 6: 1, 8: 1}, r"the learner was started again 3 times already (cluster.max_restarts)"),
        ({5: 2}, "iteration 5 has failed for this reason before"),
    ],
)
def test_one_death_too_many_or_two_alike_in_one_iteration_end_the_run_in_a_sentence(
    strikes: dict[int, int], ends: str, tmp_path: Path, tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {iteration: [kill() for _ in range(count)] for iteration, count in strikes.items()}
    monkeypatch.setattr(ray_backend, "RayBackend", backend := struck(times))
    config = written(tmp_path, tiny_pipeline_dir, "doomed", "ray")
    said = here(config, "cluster.restart_wait_s=0", "evaluation.every=0", code=1)
    last = f"the run stops; the last checkpoint is {checkpoint.latest(tmp_path / 'runs' / 'doomed' / 'checkpoints')}"
    assert f"; {ends}; {last}; the same command continues from it" in said, said
    assert said.count("error: the learner (rank 0 of 1) died: ") == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in backend.pids)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_killed_while_its_learner_starts_again_goes_on_with_the_same_bits(
    tmp_path: Path, tiny_pipeline_dir: Path
) -> None:
    whole(tmp_path, tiny_pipeline_dir)
    run_dir, log, chance = tmp_path / "runs" / "killed", tmp_path / "killed.log", random.Random()
    seed = chance.randrange(10**6)
    chance.seed(seed)
    print(f"kill moments from seed {seed}")
    for iteration in (3, 6):
        process = start(tmp_path, tiny_pipeline_dir, "killed", "ray", "cluster.restart_wait_s=1")
        folder, before = own_folder_of(process.pid), log.stat().st_size
        until = time.monotonic() + 240
        while iterations_done(run_dir) < iteration and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(part_of_ray(folder, "rank"), signal.SIGKILL)
        while b"restarted: " not in log.read_bytes()[before:] and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 8))
        assert process.poll() is None, log.read_text()[-3000:]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        nothing_stays(folder)
    here(written(tmp_path, tiny_pipeline_dir, "killed", "ray"))
    assert_same_run(tmp_path / "runs" / "whole", run_dir)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c_ends_a_run_at_once_that_waits_to_start_its_learner_again(
    tmp_path: Path, tiny_pipeline_dir: Path
) -> None:
    process = start(tmp_path, tiny_pipeline_dir, "waits", "ray", "cluster.restart_wait_s=250")
    folder, log, run_dir = own_folder_of(process.pid), tmp_path / "waits.log", tmp_path / "runs" / "waits"
    until = time.monotonic() + 240
    while iterations_done(run_dir) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(part_of_ray(folder, "rank"), signal.SIGKILL)
    while "restarted: " not in log.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    code, said = process.wait(timeout=60), " ".join(log.read_text().split())
    assert code == 75 and f"stopped; the same command continues it from {run_dir / 'checkpoints'}/step_" in said, said
    nothing_stays(folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_that_would_load_other_code_than_the_run_began_with_end_it_with_its_name(
    tmp_path: Path, tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.py"
    own.write_text("from flowalign.algorithms.flow_grpo import FlowGRPO\nclass Own(FlowGRPO): pass\n")

    def turn(backend: RayBackend) -> None:
        own.write_text(own.read_text() + "\n")
        kill()(backend)

    monkeypatch.setattr(ray_backend, "RayBackend", struck({4: [turn]}))
    config = written(tmp_path, tiny_pipeline_dir, "turned", "ray")
    config.write_text(config.read_text().replace("type: flow_grpo", f'type: "{own}:Own"'))
    said = here(config, "cluster.restart_wait_s=0", "evaluation.every=0", code=1)
    assert "error: algorithm.type: " in said and "since the run began" in said and "step_000002" in said, said
