"""Requests to end: what each signal means before and after a run has begun, and files of `flowalign stop`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowalign.record import lastresort
from flowalign.record.lock import RunLock
from flowalign.record.stop import EndedEarly, NobodyRuns, StopRequest, ask_to_stop

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import sys, time
from flowalign.record.stop import EndedEarly, StopRequest
begins, alone = sys.argv[1] == "begun", len(sys.argv) < 3
try:
    with StopRequest(alone=alone).on_signals() as stop:
        if begins:
            stop.begin()
        if "met" in sys.argv:
            stop.meet()
        print("ready", flush=True)
        until = time.monotonic() + 20
        while time.monotonic() < until and not (begins and stop.asked and input() == "end"):
            time.sleep(0.01)
    sys.exit(75)
except EndedEarly:
    sys.exit(76)
except KeyboardInterrupt:
    sys.exit(130)
"""
ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]


def start(*arguments: str, **options: object) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # under nohup it is ignored
    process = subprocess.Popen([sys.executable, "-c", RUN, *arguments], cwd=ROOT, **pipes, **options)  # type: ignore
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def send(process: subprocess.Popen[str], *signals: signal.Signals, pause: float = 0.2) -> None:
    for number in signals:
        process.send_signal(number)
        time.sleep(pause)


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_before_the_beginning_ends_at_once_and_later_after_the_iteration(number: signal.Signals) -> None:
    starting, begun = start("starting"), start("begun")
    send(starting, number)
    assert starting.wait(timeout=10) == 76
    send(begun, number)
    assert begun.poll() is None
    said = begun.communicate("end\n", timeout=10)[1]
    assert begun.returncode == 75 and "stopping after this iteration with a checkpoint" in said
    starting.communicate()


def test_a_second_ctrl_c_ends_at_once_a_second_sigterm_does_not() -> None:
    twice, terminated = start("begun"), start("begun")
    send(twice, signal.SIGINT, signal.SIGINT)
    assert twice.wait(timeout=10) == 130
    send(terminated, signal.SIGTERM, signal.SIGTERM, signal.SIGINT)
    assert terminated.poll() is None
    terminated.communicate("end\n", timeout=10)
    assert terminated.returncode == 75
    twice.communicate()


def test_of_several_ranks_none_leaves_the_others_and_an_echoed_ctrl_c_counts_once() -> None:
    rank = start("starting", "rank")
    send(rank, signal.SIGINT, signal.SIGINT)
    assert rank.poll() is None
    rank.kill()
    rank.communicate()


def test_what_ends_the_other_ranks_where_one_has_failed_ends_a_rank_that_has_not_met_them_yet() -> None:
    loading, met = start("starting", "rank"), start("starting", "rank", "met")
    send(loading, signal.SIGTERM)
    send(met, signal.SIGTERM)
    assert loading.wait(timeout=10) == 76 and met.poll() is None
    met.kill()
    for process in (loading, met):
        process.communicate()


def test_nohup_keeps_a_run_from_hearing_that_the_terminal_closed() -> None:
    process = start("begun", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    send(process, signal.SIGHUP)
    assert process.poll() is None
    process.kill()
    assert "stopping" not in process.communicate()[1]


def test_a_request_is_obeyed_by_the_holder_it_was_for_and_removed(tmp_path: Path) -> None:
    with RunLock.take(tmp_path) as lock:
        stop = StopRequest()
        with stop.watching(lock):
            stop.begin()
            assert not stop.asked
            assert ask_to_stop(tmp_path).process.pid == os.getpid()  # type: ignore[union-attr]
            deadline = time.monotonic() + 3
            while not stop.asked and time.monotonic() < deadline:
                time.sleep(0.05)
            assert stop.asked and not (tmp_path / "stop").exists()


def test_a_request_for_an_earlier_run_is_removed_when_a_run_starts(tmp_path: Path) -> None:
    with RunLock.take(tmp_path):
        ask_to_stop(tmp_path)
    assert (tmp_path / "stop").exists()
    with RunLock.take(tmp_path) as lock, (stop := StopRequest()).watching(lock):
        stop.begin()
        assert not stop.asked and not (tmp_path / "stop").exists()


def test_a_request_before_the_first_iteration_ends_the_run_there(tmp_path: Path) -> None:
    with RunLock.take(tmp_path) as lock, (stop := StopRequest()).watching(lock):
        ask_to_stop(tmp_path)
        with pytest.raises(EndedEarly):
            stop.begin()
        assert not lock.begun


@pytest.mark.parametrize("there", ["none", "", "config.yaml", "checkpoints"])
def test_where_nobody_runs_there_is_nothing_to_stop(tmp_path: Path, there: str) -> None:
    run_dir = tmp_path / "run"
    if there != "none":
        (run_dir / there).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        NobodyRuns, match="is held by nobody" if there in ("config.yaml", "checkpoints") else "is no run"
    ):
        ask_to_stop(run_dir)
    assert sorted(tmp_path.rglob("*")) == before


HELD = """
import ctypes, threading
from flowalign.record import lastresort
from flowalign.record.stop import StopRequest
lastresort.GRACE_S = 0.3
with StopRequest().on_signals() as stop:
    stop.begin()
    stop.last_words = lambda: "these words"
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    threading.Timer(0.5, print, ["ready"], {"flush": True}).start()  # by then this thread is held
    lock(mutex)  # for ever, and no signal interrupts it
"""


def test_a_second_ctrl_c_ends_a_process_that_is_held_in_a_call_which_hears_no_signal() -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", HELD], cwd=ROOT, **pipes)  # type: ignore[call-overload]
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        send(process, signal.SIGINT)
        assert process.poll() is None
        send(process, signal.SIGINT)
        assert process.communicate(timeout=20)[1] == "error: these words\n"
        assert process.returncode == 130
    finally:
        process.kill()


def test_what_a_forked_child_hears_is_not_meant_for_its_parent() -> None:
    heard: list[int] = []
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGUSR1)}
    try:
        with lastresort.hearing(lambda number: heard.append(number) or False, lambda: ""):  # type: ignore[func-returns-value]
            child = os.fork()
            if child == 0:
                os.kill(os.getpid(), signal.SIGINT)
                os._exit(0)
            os.waitpid(child, 0)
            os.kill(os.getpid(), signal.SIGUSR1)
            until = time.monotonic() + 20
            while signal.SIGUSR1 not in heard and time.monotonic() < until:
                time.sleep(0.01)
        assert heard == [signal.SIGUSR1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
