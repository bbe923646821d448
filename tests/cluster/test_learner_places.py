"""A learner whose machine is lost: Ray finds its ranks a place on another one, or the run ends in a sentence."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flowalign.cluster import ranks
from flowalign.cluster.errors import ClusterError, LearnerLost
from flowalign.cluster.pool import Pool
from flowalign.cluster.ranks import LearnerGroup, firsts
from flowalign.cluster.session import read_token_anew
from flowalign.cluster.vigil import Vigil
from flowalign.config.cluster import PatienceConfig
from tests.cluster.orders import Worker

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(600)]


@pytest.fixture
def machines() -> Iterator[Cluster]:
    """Two raylets with one core each, and a token: Ray asks but once in a process whether there are any."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        read_token_anew()
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        yield cluster
        ray.shutdown()
        cluster.shutdown()
    read_token_anew()  # Ray remembers the token, and the next Ray of this process has another


def spread(folder: Path, say: Callable[[str], None]) -> LearnerGroup:
    """Two ranks that have started, on a machine each."""
    (folder / "go").touch()
    bundles = placement_group([{"CPU": 1}] * 2, strategy="SPREAD")

    def make(rank: int) -> Any:
        place = PlacementGroupSchedulingStrategy(bundles, placement_group_bundle_index=rank)
        return ray.remote(Worker).options(num_cpus=1, scheduling_strategy=place).remote(folder)

    vigil = Vigil(PatienceConfig(), say=say)
    group = LearnerGroup(2, make, vigil, Pool("teacher", 0, lambda index: None, vigil), 0)
    group.start()
    group.started()
    return group


def lose_one(machines: Cluster, group: LearnerGroup) -> str:
    machines.remove_node(next(iter(machines.worker_nodes)), allow_graceful=False)
    with pytest.raises(LearnerLost, match=r"^the learner \(rank \d of 2\) died: ") as lost:
        while True:
            group.call("answer")
    return lost.value.kind


def test_a_rank_whose_machine_is_lost_starts_on_one_that_joins(
    machines: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_PLACE_S", 2.0)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        machines.add_node(num_cpus=1)

    group = spread(tmp_path, say)
    before = list(group.pids)
    assert lose_one(machines, group)
    group.restart()
    assert group.call("answer") == ["yes", "yes"] and not set(before) & set(group.pids)
    assert said == ["late: the learner waits for a place on the cluster, 300 s at most"]
    group.kill()


def test_without_another_machine_the_run_ends_in_a_sentence(
    machines: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "RESTART_S", 6.0)
    group = spread(tmp_path, lambda text: None)
    lose_one(machines, group)
    with pytest.raises(ClusterError, match=r"^the learner found no place to start again within 6 s; give the same com"):
        group.restart()
    group.kill()


def test_the_first_rank_of_each_machine_is_told_so() -> None:
    assert firsts(["a", "a", "b", "a", "b", "c"]) == [True, False, True, False, False, True]
