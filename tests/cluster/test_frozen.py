"""Pools and ranks of the smallest actors, killed and stopped: real processes of a real Ray, without a model."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from flowalign.cluster.errors import ClusterError, LearnerLost, WorkerLost
from flowalign.cluster.pipeline import Done, Pipeline
from flowalign.cluster.pool import Pool
from flowalign.cluster.ranks import LearnerGroup
from flowalign.cluster.vigil import Vigil
from flowalign.config.cluster import PatienceConfig
from flowalign.run.patience import Patience
from tests.cluster.orders import Rollouts, Worker

pytestmark = pytest.mark.fault
CHUNKS: list[Any] = list(range(4))  # all that the actors of this file are asked for
ALONE = [range(number, number + 1) for number in range(4)]
HASTY = PatienceConfig(first_s=12, least_s=12)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One Ray for all tests of this file."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()


def made(folder: Path, *args: Any, of: type[Worker] = Worker, **faults: Any) -> Any:
    return ray.remote(of).options(num_cpus=0.1, **faults).remote(folder, *args)


def seen(done: list[Done]) -> list[list[int]]:
    """The chunks of each unit, as the driver sees them."""
    return [[int(preview.thumbnails.max()) for preview in one.previews] for one in done]


def started(folder: Path) -> set[int]:
    return {int(path.name.removeprefix("started-")) for path in folder.glob("started-*")}


@pytest.mark.slow
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
    assert set(pool.pids) == started(tmp_path) - set(before) and len(pool.deaths) == 2
    pool.kill()


def pools(folder: Path, vigil: Vigil, rollouts: int, rewards: int) -> tuple[Pool, Pool]:
    """Workers that have started, of a folder each."""
    made_here = []
    for kind, size, of in (("rollout", rollouts, Rollouts), ("reward", rewards, Worker)):
        place = folder / kind
        place.mkdir()
        (place / "go").touch()
        made_here.append(Pool(kind, size, lambda index, place=place, of=of: made(place, of=of), vigil))
    for pool in made_here:
        pool.started()
    return made_here[0], made_here[1]


@pytest.mark.parametrize(
    ("orders", "lost"), [(["rollout/die 1", "reward/die 1"], (1, 1)), (["reward/die 1", "reward/die 2"], (0, 2))]
)
@pytest.mark.slow
def test_workers_of_two_kinds_or_two_rewards_that_die_over_their_chunks_start_again_side_by_side(
    tmp_path: Path, orders: list[str], lost: tuple[int, int]
) -> None:
    vigil = Vigil(PatienceConfig())
    rollouts, rewards = pools(tmp_path, vigil, 2, 2)
    folders = [tmp_path / "rollout", tmp_path / "reward"]
    before = set(rollouts.pids + rewards.pids)
    for order in orders:
        (tmp_path / order).touch()
    for folder in folders:
        (folder / "go").unlink()  # from now on none of them is ready before both have begun

    def let_go_once_both_began() -> None:
        if len({pid for folder in folders for pid in started(folder)} - before) == 2:
            for folder in folders:
                (folder / "go").touch()

    vigil._check = let_go_once_both_began
    done = Pipeline(CHUNKS, ALONE, rollouts, rewards, False, 3, 600.0).run()
    assert [one.scores for one in done] == [f"scores of chunk {i}" for i in range(4)]
    assert seen(done) == [[0], [1], [2], [3]]
    rollouts.settle()
    rewards.settle()
    assert (len(rollouts.deaths), len(rewards.deaths)) == lost
    for pool in (rollouts, rewards):
        pool.kill()


def test_a_chunk_that_may_not_be_made_again_and_a_rank_that_is_gone_end_the_run_in_a_sentence(tmp_path: Path) -> None:
    vigil = Vigil(PatienceConfig())
    rollouts, rewards = pools(tmp_path, vigil, 1, 1)
    (tmp_path / "reward" / "die 1").touch()
    with pytest.raises(WorkerLost, match=r"^the reward worker died 1 times over chunk \d of 4 .*retries=0.*so: it"):
        Pipeline(CHUNKS, ALONE, rollouts, rewards, False, 0, 600.0).run()
    for pool in (rollouts, rewards):
        pool.kill()
    (tmp_path / "go").touch()
    group = LearnerGroup(1, lambda rank: made(tmp_path), vigil, Pool("teacher", 0, lambda i: None, vigil), 3)
    group.start()
    group.started()
    os.kill(group.pids[0], signal.SIGKILL)
    gone = "it was killed by SIGKILL|its process was gone at once"  # older kernels tell nobody of the signal
    with pytest.raises(LearnerLost, match=rf"rank 0 of 1\) died: ({gone})") as lost:
        group.call("answer")
    assert "memory" not in str(lost.value)
    group.kill()


def test_chunks_that_are_scored_as_one_are_all_there_though_workers_die_over_them(tmp_path: Path) -> None:
    rollouts, rewards = pools(tmp_path, Vigil(PatienceConfig()), 2, 1)
    for order in ("rollout/die 1", "reward/die 1"):
        (tmp_path / order).touch()
    said: list[str] = []
    units = [range(3), range(3, 4)]
    pipeline = Pipeline(CHUNKS, units, rollouts, rewards, False, 3, 600.0)
    done = pipeline.run(say=said.append)
    assert seen(done) == [[0, 1, 2], [3]]
    assert ray.get(pipeline.trajectory_refs) == [f"trajectories of chunk {i}" for i in range(4)]
    assert [one.scores for one in done] == ["scores of chunk 0 and chunk 1 and chunk 2", "scores of chunk 3"]
    assert (len(rollouts.deaths), len(rewards.deaths)) == (1, 1)
    for pool in (rollouts, rewards):
        pool.kill()


def test_rollouts_that_hang_and_a_reward_that_is_stopped_are_ended_and_their_chunks_made_again(tmp_path: Path) -> None:
    """One rollout sleeps for ever, another as well and lets nothing else of its process go on; neither is stopped."""
    said: list[str] = []
    vigil = Vigil(PatienceConfig())
    rollouts, rewards = pools(tmp_path, vigil, 3, 1)
    before = {"rollout": list(rollouts.pids), "reward": list(rewards.pids)}
    known = {"rollout of a chunk": 0.1, "scores of a chunk": 0.1}
    vigil.patience = Patience(PatienceConfig(least_s=6, factor=2), known)
    for order in ("rollout/sleep", "rollout/hold", "reward/stop"):
        (tmp_path / order).touch()
    done = Pipeline(CHUNKS, ALONE, rollouts, rewards, False, 3, 600.0).run(say=said.append)
    assert [one.scores for one in done] == [f"scores of chunk {i}" for i in range(4)]
    rollouts.settle()
    rewards.settle()
    assert (len(rollouts.deaths), len(rewards.deaths)) == (2, 1)
    for kind, pool in (("rollout", rollouts), ("reward", rewards)):
        late, lost = (
            [line for line in said if re.match(f"{word}: (the )?{kind} ", line)] for word in ("late", "retried")
        )
        assert len(late) == len(lost) == len(pool.deaths), said
        assert all("has not answered for " in line and "ended and made again at" in line for line in late)
        assert all("it did not answer for" in line and "memory" not in line for line in lost)
        assert all((", since its process is stopped)" in line) == (kind == "reward") for line in lost)
        ended = set(before[kind]) - set(pool.pids)
        assert len(ended) == len(pool.deaths) and not any(Path(f"/proc/{pid}").exists() for pid in ended)
        pool.kill()


@pytest.mark.slow
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
    assert "(learner stop, the first of its kind), since its process is stopped" in said_last
    assert "memory" not in said_last and len(said) == 1
    assert said[0].startswith("late: the learner (rank 1 of 2) has not answered for ") and "it is ended at" in said[0]
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
