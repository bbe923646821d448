"""Who holds a run directory, asked of real processes and of files as other machines leave them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from flowalign.record.holder import holder
from flowalign.record.lock import LockLost, RunDirectoryError, RunHeld, RunLock
from flowalign.record.process import Process

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pathlib import Path
from flowalign.record.lock import RunLock
lock = RunLock.take(Path(sys.argv[1]))
lock.begun = True
print("held", flush=True)
sys.stdin.read()
lock.release()
"""
RACE = """
import sys
from pathlib import Path
from flowalign.record.lock import RunHeld, RunLock
for line in sys.stdin:
    run_dir, _, mine = line.strip().rpartition(" ")
    try:
        lock = RunLock.take(Path(run_dir))
        (Path(run_dir) / f"winner-{mine}").write_text(lock.said)
        print("won", flush=True)
    except RunHeld:
        print("refused", flush=True)
"""


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *(str(argument) for argument in arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def hold(run_dir: Path) -> subprocess.Popen[str]:
    process = python(HOLD, run_dir)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def lock_file(run_dir: Path) -> Path:
    (path,) = (run_dir / "lock").iterdir()
    return path


def held_elsewhere(run_dir: Path, silent_s: float, **changes: object) -> Process:
    """The lock of a process that is not this one, as it left it; returns the process."""
    run_dir.mkdir(exist_ok=True)
    RunLock.take(run_dir)
    path = lock_file(run_dir)
    said = json.loads(path.read_text())
    process = replace(Process(**said["process"]), **changes)
    path.write_text(json.dumps({**said, "process": vars(process)}))
    now = path.stat().st_mtime
    os.utime(path, (now - silent_s, now - silent_s))
    return process


def test_a_second_process_is_told_who_holds_the_directory_and_changes_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = hold(run_dir)
    before = sorted(path.relative_to(run_dir) for path in run_dir.rglob("*"))
    with pytest.raises(RunHeld, match=f"held by process {first.pid} on {Process.this().host} since .*still runs"):
        RunLock.take(run_dir)
    with pytest.raises(RunHeld):
        RunLock.take(run_dir, take_over=True)
    assert sorted(path.relative_to(run_dir) for path in run_dir.rglob("*")) == before
    first.communicate("")
    with RunLock.take(run_dir) as lock:
        assert lock.said == ""


@pytest.mark.parametrize("waited_for", [True, False])
def test_a_killed_holder_is_taken_over_from_even_before_its_parent_noticed(tmp_path: Path, waited_for: bool) -> None:
    first = hold(tmp_path / "run")
    first.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, first.pid, os.WEXITED | (0 if waited_for else os.WNOWAIT))
    with RunLock.take(tmp_path / "run") as lock:
        assert f"was held by process {first.pid} on" in lock.said and "which is gone: taken over" in lock.said
    first.communicate()


def test_a_number_that_was_given_to_another_process_is_not_the_holder(tmp_path: Path) -> None:
    held_elsewhere(tmp_path, 0, started="1")
    assert "which is gone" in RunLock.take(tmp_path).said


@pytest.mark.parametrize(
    "changes",
    [{"host": "elsewhere"}, {"boot": "another"}, {"space": "pid:[1]"}, {"host": "elsewhere", "boot": "another"}],
)
def test_of_another_machine_boot_or_container_only_the_silence_is_judged(
    tmp_path: Path, changes: dict[str, str]
) -> None:
    """The number that it names is free here, or another's."""
    held_elsewhere(tmp_path, 290, **changes, pid=2**22 - 1)
    with pytest.raises(RunHeld, match=r"last heard of 29\d s ago.*add --take-over, or wait until .* for 5 minutes"):
        RunLock.take(tmp_path)
    lock = RunLock.take(tmp_path, take_over=True)
    assert "by --take-over: taken over" in lock.said
    lock.release()
    held_elsewhere(tmp_path, 310, **changes)
    assert "which is gone" in RunLock.take(tmp_path).said


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"7"])
def test_a_taker_that_has_not_written_itself_down_is_given_its_time(tmp_path: Path, content: bytes) -> None:
    held_elsewhere(tmp_path, 10)
    lock_file(tmp_path).write_bytes(content)
    with pytest.raises(RunHeld, match="a process that has just taken it over"):
        RunLock.take(tmp_path)
    os.utime(lock_file(tmp_path), (1, 1))
    assert "which is gone" in RunLock.take(tmp_path).said


def test_a_holder_that_was_robbed_notices_and_leaves_the_new_lock_alone(tmp_path: Path) -> None:
    robbed = RunLock.take(tmp_path)
    robbed.check()
    path = lock_file(tmp_path)
    path.write_text(path.read_text().replace(Process.this().boot, "another"))
    taker = RunLock.take(tmp_path, take_over=True)
    for _ in range(2):
        with pytest.raises(LockLost, match=f"taken over by process {os.getpid()} on .*writes nothing more"):
            robbed.check()
    robbed.release()
    taker.check()
    assert lock_file(tmp_path).name == taker.token
    taker.release()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_moved_away_from_its_holder_is_noticed(tmp_path: Path) -> None:
    lock = RunLock.take(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(LockLost, match="run was moved or deleted"):
        lock.check()


def test_the_copy_of_a_directory_that_is_held_is_free(tmp_path: Path) -> None:
    first = hold(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    RunLock.take(tmp_path / "copy").release()
    with pytest.raises(RunHeld):
        RunLock.take(tmp_path / "run")
    first.communicate("")


def test_what_began_nothing_leaves_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "new"
    with RunLock.take(run_dir):
        (run_dir / "config.yaml").write_text("seed: 0\n")
    assert list(tmp_path.iterdir()) == []
    with RunLock.take(run_dir):
        (run_dir / "notes.txt").write_text("the user's own")
    assert [path.name for path in run_dir.iterdir()] == ["notes.txt"]
    with RunLock.take(run_dir):
        (run_dir / "config.yaml").write_text("seed: 0\n")
    assert (run_dir / "config.yaml").is_file()  # it was no new directory
    with RunLock.take(tmp_path / "begun") as lock:
        lock.begun = True
    assert (tmp_path / "begun").is_dir()


@pytest.mark.parametrize("place", ["/proc/flowalign", "/sys/flowalign", "{file}/run"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    run_dir = Path(place.format(file=tmp_path / "file"))
    began = time.monotonic()
    with pytest.raises(RunDirectoryError, match=f"^runs_dir: {run_dir} cannot be written .*; choose another"):
        RunLock.take(run_dir)
    assert time.monotonic() - began < 5


def test_other_files_in_the_place_of_the_lock_are_named(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / ".DS_Store").write_text("")
    with pytest.raises(RunDirectoryError, match="lock holds other files than a lock"):
        RunLock.take(tmp_path)


def test_a_forked_child_does_not_let_go_of_its_parents_lock(tmp_path: Path) -> None:
    lock = RunLock.take(tmp_path)
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    lock.check()
    assert holder(tmp_path) is not None
    lock.release()
    assert holder(tmp_path) is None


@pytest.mark.parametrize("left_by", ["nobody", "a killed process"])
def test_of_several_that_come_at_once_one_wins(tmp_path: Path, left_by: str) -> None:
    racers = [python(RACE) for _ in range(4)]
    try:
        for round_ in range(25):
            run_dir = tmp_path / f"run {round_}"
            if left_by == "a killed process":
                held_elsewhere(run_dir, 0, started="1")
            for number, racer in enumerate(racers):
                assert racer.stdin is not None
                racer.stdin.write(f"{run_dir} {number}\n")
            for racer in racers:
                racer.stdin.flush()  # type: ignore[union-attr]
            answers = [racer.stdout.readline().strip() for racer in racers]  # type: ignore[union-attr]
            assert sorted(answers) == ["refused", "refused", "refused", "won"]
            (winner,) = run_dir.glob("winner-*")
            assert ("taken over" in winner.read_text()) == (left_by == "a killed process")
            assert len(list((run_dir / "lock").iterdir())) == 1
    finally:
        for racer in racers:
            racer.communicate()
