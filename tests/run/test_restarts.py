"""How often, and after which wait, the learner may start again in mid-run."""

from __future__ import annotations

import pytest

from flowalign.cluster.errors import LearnerLost
from flowalign.config.cluster import ClusterConfig
from flowalign.run.restarts import LONGEST_WAIT_S, Restarts


def lost(kind: str = "it was killed by SIGKILL") -> LearnerLost:
    return LearnerLost(f"the learner (rank 0 of 2) died: {kind}", kind)


def test_each_wait_is_twice_the_last_up_to_an_end() -> None:
    restarts = Restarts(ClusterConfig(max_restarts=20, restart_wait_s=1.5))
    waits = [restarts.wait_s(lost(), iteration) for iteration in range(1, 12)]
    assert waits[:4] == [1.5, 3.0, 6.0, 12.0] and waits[-1] == LONGEST_WAIT_S


def test_one_restart_more_than_allowed_ends_the_run_in_a_sentence() -> None:
    restarts = Restarts(ClusterConfig(max_restarts=2))
    for iteration in (3, 5):
        restarts.wait_s(lost(), iteration)
    said = (
        r"died: it was killed by SIGKILL; the learner was started again 2 times already \(cluster.max_restarts\); the"
    )
    with pytest.raises(LearnerLost, match=said):
        restarts.wait_s(lost(), 7)


def test_without_restarts_the_first_death_ends_the_run() -> None:
    with pytest.raises(
        LearnerLost, match=r"^the learner \(rank 0 of 2\) died: it was killed by SIGKILL; the run stops$"
    ):
        Restarts(ClusterConfig(max_restarts=0)).wait_s(lost(), 1)


def test_an_iteration_may_fail_twice_for_two_reasons_and_never_for_one() -> None:
    restarts = Restarts(ClusterConfig(max_restarts=9))
    restarts.wait_s(lost(), 4)
    restarts.wait_s(lost("it ended with exit code 3"), 4)
    restarts.wait_s(lost(), 3)
    with pytest.raises(LearnerLost, match=r"SIGKILL; iteration 4 has failed for this reason before; the run stops$"):
        restarts.wait_s(lost(), 4)


def test_ten_iterations_beyond_all_that_failed_begin_a_new_count_and_those_done_again_do_not() -> None:
    restarts = Restarts(ClusterConfig(max_restarts=2, restart_wait_s=1))
    assert [restarts.wait_s(lost(), iteration) for iteration in (5, 15, 25, 34)] == [1, 1, 1, 2]
    with pytest.raises(LearnerLost, match="2 times already"):
        restarts.wait_s(lost(), 34 + 9)
    assert restarts.total == 4
    stuck = Restarts(ClusterConfig(max_restarts=2))
    for iteration in (15, 12):  # both from the beginning: twelve iterations were good, and nothing was won
        stuck.wait_s(lost(), iteration)
    with pytest.raises(LearnerLost, match="2 times already"):
        stuck.wait_s(lost(), 14)
