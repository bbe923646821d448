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

from flowalign.cluster.session import NICENESS, RaySession


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
    before = set(own_heads())  # of other tests of this process

    def kill_the_first() -> None:
        until = time.monotonic() + 60
        while not killed and time.monotonic() < until:
            for pid in set(own_heads()) - before:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.001)

    hunter = threading.Thread(target=kill_the_first)
    hunter.start()
    session = RaySession(None, [], "cpu")
    try:
        hunter.join()
        assert len(killed) == 1 and len(set(own_heads()) - before) == 1
        assert [line.startswith("Ray did not start and is started again: ") for line in session.said] == [True]
        assert ray.get(ray.remote(lambda: 5).remote()) == 5
    finally:
        session.close()
    assert not set(own_heads()) - before


AS_NICE = """
import os, ray
from flowalign.cluster.session import RaySession

os.nice(2)
session = RaySession(None, [], "cpu")
print(ray.get(ray.remote(lambda: os.getpriority(os.PRIO_PROCESS, 0)).remote()) - os.getpriority(os.PRIO_PROCESS, 0))
session.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("told", [None, 3])
def test_workers_are_as_nice_as_their_run_where_nobody_says_otherwise(told: int | None) -> None:
    variables = {name: value for name, value in os.environ.items() if name != NICENESS}
    if told is not None:
        variables[NICENESS] = str(told)
    done = subprocess.run([sys.executable, "-c", AS_NICE], env=variables, capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == [str(told or 0)], done.stderr[-2000:]


ONE_AFTER_ANOTHER = """
import os, ray
from flowalign.cluster.session import RaySession

def answers(session=None):
    print(ray.get(ray.remote(lambda: 5).remote()), session and session.said, "RAY_AUTH_TOKEN" in os.environ)
    (session.close if session else ray.shutdown)()

ray.init(num_cpus=1, include_dashboard=False)  # with the token in the user's home
answers()
for _ in range(2):
    answers(RaySession(None, [], "cpu"))
ray.init(num_cpus=1, include_dashboard=False)
answers()
print("RAY_AUTH_TOKEN" in os.environ)
"""


@pytest.mark.slow
def test_rays_of_one_process_start_one_after_another_each_with_its_token(tmp_path: Path) -> None:
    """Ray remembers the first token, which would shut the process out of its own Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    kept |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_ANOTHER], env=kept, capture_output=True, text=True, timeout=200
    )
    expected = ["5 None False", "5 [] True", "5 [] True", "5 None False", "False"]
    assert done.stdout.splitlines() == expected, done.stderr[-2000:]
