"""What is ended after a run that was killed, and what is not: real processes that write where Ray's would, no Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from flowalign.cluster import guardian
from flowalign.cluster.folder import OWNER, own_folder, sweep
from flowalign.record.process import Process

pytestmark = pytest.mark.fault
OPENS = "import sys, time; file = open(sys.argv[1], sys.argv[2]); print('open', flush=True); time.sleep(600)"
DRIVER = """
import sys, time
from flowalign.cluster.guardian import start
start(sys.argv[1])
print("up", flush=True)
time.sleep(600)
"""


def begun(code: str, *args: object) -> subprocess.Popen[str]:
    """A process that has come as far as to print a line."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", code, *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stdout.readline()
    return process


def comes_true(asked: Callable[[], bool]) -> bool:
    until = time.monotonic() + 60
    while not asked() and time.monotonic() < until:
        time.sleep(0.05)
    return asked()


class Ray:
    """Three processes of a session in ``folder``: one writes, one is stopped while it does, one, a person's, reads."""

    def __init__(self, folder: Path) -> None:
        logs = folder / "session_2026-01-01_00-00-00_000000_1" / "logs"
        logs.mkdir(parents=True)
        self.agent = begun(OPENS, logs / "dashboard_agent.log", "a")
        self.stopped = begun(OPENS, logs / "worker-0a1b-01000000-77.err", "w")
        self.stopped.send_signal(signal.SIGSTOP)
        self.reader = begun(OPENS, logs / "dashboard_agent.log", "r")
        self.own = begun(OPENS, logs / "notes.txt", "w")

    def only_rays_own_are_gone(self) -> bool:
        gone = comes_true(lambda: self.agent.poll() == self.stopped.poll() == -signal.SIGKILL)
        return gone and self.reader.poll() is None and self.own.poll() is None

    def end(self) -> None:
        for process in (self.agent, self.stopped, self.reader, self.own):
            process.kill()
            process.wait()


def test_after_a_killed_run_its_rays_processes_end_and_its_directory_goes(tmp_path: Path) -> None:
    folder = tmp_path / "flowalign-abcdefgh"
    folder.mkdir()
    driver, ray = begun(DRIVER, folder), Ray(folder)
    try:
        time.sleep(0.3)
        assert ray.agent.poll() is None
        driver.kill()
        driver.wait()
        assert ray.only_rays_own_are_gone()
        assert comes_true(lambda: not folder.exists())
    finally:
        ray.end()
        driver.kill()


def test_a_start_sweeps_what_a_dead_run_has_left_and_nothing_of_one_that_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    short = Path(f"/tmp/fa-{os.getpid()}")
    short.mkdir(mode=0o700)
    monkeypatch.setenv("TMPDIR", str(short))
    dead, mine, elsewhere = (Path(own_folder()) for _ in range(3))
    assert dead.parent == short
    me = Process.this()
    (dead / OWNER).write_text(json.dumps(asdict(replace(me, started="1"))))  # its number, given again since
    (elsewhere / OWNER).write_text(json.dumps(asdict(replace(me, host="other", started="1"))))
    rays = [Ray(dead), Ray(mine)]
    try:
        assert sweep() == [f"ended what process {me.pid}, which is gone, had left of its Ray: 2 processes"]
        assert rays[0].only_rays_own_are_gone() and not dead.exists()
        assert rays[1].agent.poll() is None and mine.exists() and elsewhere.exists()
        assert sweep() == []
        assert sorted(guardian.end(str(mine))) == sorted([rays[1].agent.pid, rays[1].stopped.pid])
    finally:
        for ray in rays:
            ray.end()
        subprocess.run(["rm", "-r", str(short)], check=True)
