"""A run's own Ray that is stopped, not killed: it is blamed alone, and the run ends all the same."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowalign.cli.exits import ExitCode
from tests.fault.test_kill_and_resume import assert_same_run, finished, start
from tests.fault.test_lost_ray import nothing_stays, own_folder_of, part_of_ray

pytestmark = pytest.mark.fault
REPO = Path(__file__).resolve().parents[2]
WAITS = """
import sys, time
import ray
from flowalign.cluster.session import RaySession
from flowalign.cluster.vigil import Vigil
from flowalign.config.cluster import PatienceConfig
from flowalign.record.stop import StopRequest

class Sleeper:
    def sleep(self, seconds):
        time.sleep(seconds)

session = RaySession(None, [], "cpu", patience_s=float(sys.argv[1]), say=lambda text: print(text, file=sys.stderr))
vigil = Vigil(PatienceConfig(), session.check)
with StopRequest().on_signals() as stop:
    stop.begin()
    try:
        actor = ray.remote(Sleeper).options(num_cpus=0.1).remote()
        ray.get(actor.sleep.remote(0))
        print(session._folder, *(session._processes[name].pid for name in ("gcs_server", "raylet")), flush=True)
        if sys.argv[2] == "asks":
            ray.get(actor.sleep.remote(600))
        while True:
            vigil.step([actor.sleep.remote(600)])
    finally:
        session.close()
"""


def waiting(patience_s: float, how: str = "looks") -> tuple[subprocess.Popen[str], str, dict[str, int]]:
    """A process that waits for an actor; the directory of its Ray, and Ray's processes."""
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", WAITS, str(patience_s), how]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)  # type: ignore[call-overload]
    assert process.stdout is not None
    folder, head, raylet = process.stdout.readline().split()
    return process, folder, {"gcs_server": int(head), "raylet": int(raylet)}


def all_of(process: subprocess.Popen[str]) -> str:
    """What it has said on standard error when it ends."""
    try:
        return process.communicate(timeout=55)[1]
    finally:
        process.kill()


@pytest.mark.slow
def test_while_its_ray_is_stopped_a_process_blames_that_alone_and_ends_in_a_sentence_leaving_nothing() -> None:
    process, folder, parts = waiting(2)
    raylet = f"Ray's raylet (process {parts['raylet']})"
    os.kill(parts["raylet"], signal.SIGSTOP)
    process.terminate()  # it cannot finish what it is at
    said = all_of(process)
    assert said.count(f"late: {raylet} is stopped; if it goes on so the run ends at ") == 1, said
    assert f"ClusterLost: {raylet} has been stopped for 2 s" in said, said
    nothing_stays(folder)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["gcs_server", "raylet"])
def test_a_process_that_is_held_in_a_call_of_a_stopped_ray_ends_and_leaves_nothing(part: str) -> None:
    process, folder, parts = waiting(2, "asks")
    os.kill(parts[part], signal.SIGSTOP)
    all_of(process)
    assert process.returncode == 1
    nothing_stays(folder)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["gcs_server", "raylet"])
@pytest.mark.parametrize("how", ["looks", "asks"])
def test_a_second_ctrl_c_ends_a_process_whose_ray_is_stopped(part: str, how: str) -> None:
    process, folder, parts = waiting(600, how)
    os.kill(parts[part], signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    all_of(process)
    assert process.returncode in (-signal.SIGINT, ExitCode.AT_ONCE)  # Python's own end of it, or the last resort's
    nothing_stays(folder)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_whose_ray_was_stopped_goes_on_with_the_same_bits(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    finished(start(tmp_path, tiny_pipeline_dir, "whole", "local"), tmp_path / "whole.log")
    log = tmp_path / "frozen.log"
    log.touch()
    for part, more in (("gcs_server", ()), ("raylet", ("cluster.patience.least_s=10",))):
        before = log.stat().st_size
        process = start(tmp_path, tiny_pipeline_dir, "frozen", "ray", *more)
        folder = own_folder_of(process.pid)
        until = time.monotonic() + 240
        while not re.search(r"iteration [3-8]/8", log.read_bytes()[before:].decode()) and time.monotonic() < until:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.05)
        os.kill(part_of_ray(folder, part), signal.SIGSTOP)
        process.terminate()
        code, said = process.wait(timeout=120), " ".join(log.read_text().split())
        nothing_stays(folder)
        assert code == ExitCode.FAILED, said[-3000:]
        line = rf"error: Ray's {part} \(process \d+\) has been stopped for {'10' if more else '30'} s.*; the last .*"
        assert re.search(rf"{line}the same command continues", said), said[-3000:]
        assert "retried: " not in said and "Traceback" not in said, said[-3000:]
    finished(start(tmp_path, tiny_pipeline_dir, "frozen", "ray"), log)
    assert_same_run(tmp_path / "runs" / "whole", tmp_path / "runs" / "frozen")
