"""A run's own Ray whose parts are killed, and a run that is killed: nothing stays, and the same command goes on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flowalign.cli.exits import ExitCode
from flowalign.cluster import guardian
from tests.cluster.test_launch import RAY, free_ports
from tests.fault.test_kill_and_resume import REWARD, assert_same_run, finished, here, iterations_done, start, written

pytestmark = pytest.mark.fault
REPO = Path(__file__).resolve().parents[2]
WAITS = """
import logging, os, sys, time
import ray
from flowalign.cluster.session import RaySession
from flowalign.cluster.vigil import Vigil
from flowalign.config.cluster import PatienceConfig

class Sleeper:
    def pid(self):
        return os.getpid()
    def sleep(self):
        time.sleep(600)

session = RaySession(None, [], "cpu")
actor = ray.remote(Sleeper).options(num_cpus=0.1).remote()
print(session._folder, session._processes["gcs_server"].pid, ray.get(actor.pid.remote()), flush=True)
try:
    while True:
        Vigil(PatienceConfig(), session.check).step([actor.sleep.remote()])
finally:
    session.close()
"""


def of_ray(folder: str) -> list[str]:
    """The processes that name ``folder`` or have a file in it open."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            opened = [os.readlink(f) for f in (entry / "fd").iterdir()]
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if folder in command or any(path.startswith(folder) for path in opened):
            found.append(f"{entry.name} {command}")
    return found


def nothing_stays(folder: str) -> None:
    until = time.monotonic() + 60
    while (of_ray(folder) or Path(folder).exists()) and time.monotonic() < until:
        time.sleep(0.1)
    assert of_ray(folder) == [] and not Path(folder).exists()


def waiting() -> tuple[subprocess.Popen[str], str, int, int]:
    """A process that waits for an actor; the directory of its Ray, the head's process and the actor's."""
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", WAITS], env=environment, **pipes)  # type: ignore[call-overload]
    assert process.stdout is not None
    folder, head, actor = process.stdout.readline().split()
    return process, folder, int(head), int(actor)


@pytest.mark.slow
def test_without_the_head_of_its_ray_a_process_ends_in_a_sentence_and_leaves_nothing() -> None:
    process, folder, head, actor = waiting()
    assert len(of_ray(folder)) >= 5
    os.kill(actor, signal.SIGSTOP)
    os.kill(head, signal.SIGKILL)
    said = process.communicate(timeout=55)[1]  # Ray itself would end the process after 60 s
    assert f"Ray's gcs_server (process {head}) is gone, and the workers with it: it was killed by SIGKILL" in said
    nothing_stays(folder)


@pytest.mark.slow
def test_of_a_killed_process_nothing_of_its_ray_stays_not_even_a_stopped_actor() -> None:
    process, folder, _, actor = waiting()
    os.kill(actor, signal.SIGSTOP)
    process.kill()
    process.communicate()
    nothing_stays(folder)


def own_folder_of(pid: int) -> str:
    """The directory of the Ray of a process that has started one."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if len(words) > 5 and words[3].endswith("guardian.py") and words[4] == str(pid):
                return words[5]
        time.sleep(0.1)
    raise AssertionError(f"{pid} has started no Ray")


def part_of_ray(folder: str, name: str) -> int:
    wanted = "ray::LearnerActor" if name == "rank" else f"/{name}"
    commands = [line.split()[:2] for line in of_ray(folder)]
    return int(next(pid for pid, first in commands if wanted in first.split("\0")[0]))


def whole(folder: Path, pipeline: Path, reward: str = REWARD) -> None:
    """The run that nobody disturbs: without Ray, and with the engine that runs on Ray have."""
    config = written(folder, pipeline, "whole", "ray", reward)
    config.write_text(config.read_text().replace("backend: ray", "backend: local"))
    here(config)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_whose_ray_or_self_is_killed_or_whose_rank_is_frozen_goes_on_with_the_same_bits(
    tmp_path: Path, tiny_pipeline_dir: Path
) -> None:
    whole(tmp_path, tiny_pipeline_dir)
    log = tmp_path / "killed.log"
    log.touch()
    # It may be frozen over its first checkpoint.
    hasty = ["cluster.patience={first_s: 120, least_s: 12, factor: 5}", "cluster.max_restarts=0"]
    for victim in ("gcs_server", "raylet", "rank", "itself"):
        before = log.stat().st_size
        process = start(tmp_path, tiny_pipeline_dir, "killed", "ray", *hasty * (victim == "rank"))
        folder = own_folder_of(process.pid)
        until = time.monotonic() + 240
        while not re.search(r"iteration [3-8]/8", log.read_bytes()[before:].decode()) and time.monotonic() < until:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.05)
        pid = process.pid if victim == "itself" else part_of_ray(folder, victim)
        os.kill(pid, signal.SIGSTOP if victim == "rank" else signal.SIGKILL)
        code = process.wait(timeout=200)
        nothing_stays(folder)
        if victim != "itself":
            said = log.read_text()
            assert code == ExitCode.FAILED, said[-3000:]
            line = rf"Ray's {victim} \(process \d+\) is gone.* killed by SIGKILL; .*the same command continues"
            if victim == "rank":
                line = (
                    r"the learner \(rank 0 of 1\) was ended: .* since its process is stopped; .*same command continues"
                )
            assert re.search(line, " ".join(said.split())), said[-3000:]
    finished(start(tmp_path, tiny_pipeline_dir, "killed", "ray"), log)
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "killed")


@contextmanager
def cluster(folder: Path, ports: list[int]) -> Iterator[None]:
    """A head that was started by hand, and nothing of it afterwards."""
    port, client, agent = map(str, ports)
    line = [str(RAY), "start", "--head", "--port", port, "--ray-client-server-port", client, "--temp-dir", str(folder)]
    line += ["--dashboard-agent-listen-port", agent, "--include-dashboard", "false", "--num-cpus", "2"]
    line += ["--object-store-memory", str(200 << 20), "--disable-usage-stats"]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        guardian.end(str(folder))
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_that_joined_a_cluster_whose_head_is_lost_ends_in_a_sentence_and_goes_on_with_the_same_bits(
    tmp_path: Path, tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    slow = REWARD.replace("return", "import ray, time; time.sleep(5 * ray.is_initialized()); return")
    whole(tmp_path, tiny_pipeline_dir, slow)
    run_dir, log, ports = tmp_path / "runs" / "joined", tmp_path / "joined.log", free_ports(3)
    folder, address = Path("/tmp") / f"fl{ports[0]}", f"cluster.address=127.0.0.1:{ports[0]}"
    with cluster(folder, ports):
        process = start(tmp_path, tiny_pipeline_dir, "joined", "ray", address, reward=slow)
        until = time.monotonic() + 240
        while iterations_done(run_dir) < 2 and time.monotonic() < until:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.05)
        os.kill(part_of_ray(str(folder), "gcs_server"), signal.SIGKILL)
        code, said = process.wait(timeout=120), " ".join(log.read_text().split())
        assert code == ExitCode.FAILED, said[-3000:]
        line = rf"error: Ray's head at \S+:{ports[0]} has not answered for 30 s \(.*; the last checkpoint is .*"
        assert re.search(f"{line}the same command continues", said), said[-3000:]
    with cluster(folder, ports):
        finished(start(tmp_path, tiny_pipeline_dir, "joined", "ray", address, reward=slow), log)
    assert_same_run(tmp_path / "runs" / "whole", run_dir)
