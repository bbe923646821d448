"""How long a silent process is waited for: real stopped processes, a clock that is handed in, no Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from flowalign.config.cluster import PatienceConfig
from flowalign.record.death import Watch, is_stopped
from flowalign.run.patience import LONGEST_STEP_S, AwakeClock, Patience, Wait


class Time:
    """Seconds that pass where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def wait_of(config: PatienceConfig, *before: float) -> tuple[Time, Wait]:
    time_s, patience = Time(), Patience(config)
    for seconds in before:
        patience.took("update", seconds)
    return time_s, Wait(patience, AwakeClock(time_s), "update")


def pass_by(time_s: Time, wait: Wait, seconds: float) -> list[float]:
    """When the wait became slow, as seen by somebody who looks once a second."""
    slow = []
    for _ in range(int(seconds)):
        time_s.now += 1
        if wait.became_slow() and not wait.late:
            slow.append(time_s.now)
        assert wait.waited_s <= time_s.now
    return slow


def test_the_first_work_of_a_kind_has_a_time_of_its_own_and_later_ones_a_multiple_of_the_longest() -> None:
    config = PatienceConfig(first_s=1000, least_s=20, factor=4)
    assert [wait_of(config, *before)[1].limit_s for before in ((), (1.0,), (3.0, 9.0, 2.0))] == [1000, 20, 36]


def test_a_silent_worker_is_told_of_once_at_half_its_time_and_late_at_its_end() -> None:
    time_s, wait = wait_of(PatienceConfig(least_s=20, factor=4), 10.0)
    assert pass_by(time_s, wait, 39) == [20] and not wait.late
    assert wait.so_far() == "has not answered for 39 s (update, at most 10 s before)"
    assert pass_by(time_s, wait, 1) == [] and wait.late
    assert wait.why() == "it did not answer for 40 s (update, at most 10 s before)"
    wait.again()
    assert not wait.late and pass_by(time_s, wait, 40) == [60]


def test_while_the_whole_job_was_suspended_nobody_was_late() -> None:
    time_s, wait = wait_of(PatienceConfig(least_s=60, factor=1), 1.0)
    pass_by(time_s, wait, 10)
    time_s.now += 7200
    assert wait.waited_s == 10 + LONGEST_STEP_S and not wait.late


def test_what_a_worker_says_that_it_took_counts_where_it_is_more() -> None:
    time_s, wait = wait_of(PatienceConfig(least_s=1, factor=2), 5.0)
    time_s.now += 1
    wait.answered(30.0)
    assert wait.limit_s == 60


@pytest.mark.fault
def test_a_stopped_process_is_known_as_such_and_ends_by_a_kill_through_its_descriptor() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)"], stdout=-1)
    assert process.stdout is not None and process.stdout.readline()
    watch = Watch(process.pid)
    assert not is_stopped(process.pid)
    os.kill(process.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 30
    while not is_stopped(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_stopped(process.pid)
    watch.kill()
    assert process.wait(timeout=30) == -signal.SIGKILL
    watch.kill()
    watch.close()
    assert not is_stopped(process.pid)
