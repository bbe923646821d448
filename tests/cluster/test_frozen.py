"""Pools and ranks of the smallest actors, killed and stopped: real processes of a real Ray, without a model."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from flowalign.cluster.actors import Mortal
from flowalign.cluster.errors import ClusterError, LearnerLost
from flowalign.cluster.patience import Patience
from flowalign.cluster.pool import Pool
from flowalign.cluster.ranks import LearnerGroup
from flowalign.cluster.vigil import Vigil
from flowalign.config import PatienceConfig

pytestmark = pytest.mark.fault
HASTY = PatienceConfig(first_s=12, least_s=12)


class Worker(Mortal):
    """``start`` waits for ``folder/go``; ``ask`` for what a teacher answers."""

    def __init__(self, folder: Path, teacher: Any = None) -> None:
        self.folder, self.teacher = folder, teacher

    def start(self, *address: Any) -> int:
        (self.folder / f"started-{os.getpid()}").touch()
        until = time.monotonic() + 60
        while not (self.folder / "go").exists():
            if time.monotonic() > until:
                raise TimeoutError("nobody let it go")
            time.sleep(0.02)
        return os.getpid()

    def address(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    def stop(self, who: int) -> int:
        if who in (os.getpid(), 0):
            os.kill(os.getpid(), signal.SIGSTOP)
        return os.getpid()

    def answer(self) -> str:
        return "yes"

    def ask(self) -> str:
        return ray.get(self.teacher.answer.remote())


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One Ray for all tests of this file."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()


def made(folder: Path, *args: Any, **faults: Any) -> Any:
    return ray.remote(Worker).options(num_cpus=0.1, **faults).remote(folder, *args)


def started(folder: Path) -> set[int]:
    return {int(path.name.removeprefix("started-")) for path in folder.glob("started-*")}


def test_workers_that_died_together_are_made_again_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    pool = Pool("rollout", 2, lambda index: made(tmp_path), Vigil(PatienceConfig()))
    pool.started()
    before = list(pool.pids)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    (tmp_path / "go").unlink()  # from now on none of them is ready before both have begun

    def let_go_once_both_began() -> None:
        if len(started(tmp_path) - set(before)) == 2:
            (tmp_path / "go").touch()

    pool.vigil = Vigil(PatienceConfig(), check=let_go_once_both_began)
    pool.replace(dict.fromkeys(range(2), "killed by this test"))
    assert set(pool.pids) == started(tmp_path) - set(before) and pool.restarts == 2
    pool.kill()


def test_a_worker_that_is_silent_while_it_starts_ends_the_start_in_a_sentence(tmp_path: Path) -> None:
    said: list[str] = []
    pool = Pool("rollout", 1, lambda index: made(tmp_path), Vigil(HASTY, say=said.append))
    with pytest.raises(ClusterError, match=r"^a rollout worker did not start within \d+ s; .*cluster.patience.first_s"):
        pool.started()
    assert len(said) == 1 and said[0].startswith("late: rollout worker 1 of 1 has not answered for "), said
    pool.kill()


def test_a_stopped_rank_is_named_not_those_that_wait_for_it(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    said: list[str] = []
    vigil = Vigil(PatienceConfig(), say=said.append)
    group = LearnerGroup(2, lambda rank: made(tmp_path), vigil, Pool("teacher", 0, lambda i: None, vigil), 3)
    group.start()
    group.started()
    vigil.patience = Patience(HASTY)
    with pytest.raises(LearnerLost) as lost:
        group.call("stop", group.pids[1])
    said_last = str(lost.value)
    assert said_last.startswith("the learner (rank 1 of 2) was ended: it did not answer for "), said_last
    assert "(learner stop, the first of its kind), since its process is stopped; the run stops" in said_last
    assert "memory" not in said_last and len(said) == 1
    assert said[0].startswith("late: the learner (rank 1 of 2) has not answered for ") and "the run ends at" in said[0]
    group.kill()
    until = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in group.pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in group.pids)


@pytest.mark.slow
def test_a_stopped_teacher_is_ended_in_place_of_the_ranks_that_wait_for_it(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    said: list[str] = []
    vigil = Vigil(PatienceConfig(), say=said.append)
    teachers = Pool("teacher", 1, lambda i: made(tmp_path, max_restarts=-1, max_task_retries=3), vigil)
    teachers.started()
    group = LearnerGroup(2, lambda rank: made(tmp_path, teachers.actors[0]), vigil, teachers, 3)
    group.start()
    group.started()
    vigil.patience = Patience(HASTY)
    stopped = teachers.pids[0]
    os.kill(stopped, signal.SIGSTOP)
    assert group.call("ask") == ["yes", "yes"]
    replaced = [line for line in said if not line.startswith("late: the learner (ranks 0 and 1 of 2) has not answered")]
    assert len(replaced) == 1 and said[0] != replaced[0], said
    assert replaced[0].startswith(f"replaced: teacher worker 1 of 1, process {stopped} did not answer for ")
    assert teachers.pids[0] != stopped and not Path(f"/proc/{stopped}").exists()
    group.kill()
    teachers.kill()
