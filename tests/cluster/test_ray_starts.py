"""A Ray whose head is killed while it starts, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import ray

from flowalign.cluster.session import RaySession


def own_heads() -> list[int]:
    """Process numbers of the heads of Ray that this process has started."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError, IndexError):
            command = (folder / "cmdline").read_bytes().split(b"\0")[0]
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if command.endswith(b"gcs_server") and parent == os.getpid():
                found.append(int(folder.name))
    return found


@pytest.mark.slow
@pytest.mark.fault
def test_a_ray_whose_head_dies_while_it_starts_is_started_again_and_leaves_nothing() -> None:
    killed: list[int] = []

    def kill_the_first() -> None:
        until = time.monotonic() + 60
        while not killed and time.monotonic() < until:
            for pid in own_heads():
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.001)

    hunter = threading.Thread(target=kill_the_first)
    hunter.start()
    session = RaySession(None, [], "cpu")
    try:
        hunter.join()
        assert len(killed) == 1 and len(own_heads()) == 1
        assert [line.startswith("Ray did not start and is started again: ") for line in session.said] == [True]
        assert ray.get(ray.remote(lambda: 5).remote()) == 5
    finally:
        session.close()
    assert not own_heads()


TWICE = """
import os, ray
from flowalign.cluster.session import RaySession
for _ in range(2):
    session = RaySession(None, [], "cpu")
    print(ray.get(ray.remote(lambda: 5).remote()), session.said)
    session.close()
    os.environ.pop("RAY_AUTH_TOKEN")
"""


@pytest.mark.slow
def test_a_second_ray_of_a_process_starts_though_its_token_was_taken_from_the_environment() -> None:
    """Ray reads the token once a process: another one would shut the process out of its own Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run([sys.executable, "-c", TWICE], env=kept, capture_output=True, text=True, timeout=200)
    assert done.stdout.splitlines() == ["5 []", "5 []"], done.stderr[-2000:]
