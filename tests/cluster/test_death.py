"""What can be said of a process's end: real processes, real files, no Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flowalign.cluster.errors import WorkerImportError
from flowalign.cluster.witness import raise_failed_import
from flowalign.record.death import Birth, Watch, ending, oom_kills

NOTHING = "its process was gone at once, without a message or a signal that it could catch, as after kill -9"


def told(birth: Birth, status: int | None, said: str = "") -> str:
    return str(ending(birth, status, said))


def ended(tmp_path: Path, code: str, said: str = "", *, watched: bool = True) -> str:
    """How a Python process that ran ``code`` ended, told by those who did not start it."""
    log = tmp_path / "worker-1.err"
    with log.open("w") as errors:
        process = subprocess.Popen([sys.executable, "-c", f"input(); {code}"], stdin=subprocess.PIPE, stderr=errors)
    watch = Watch(process.pid) if watched else None
    process.communicate(b"\n")
    try:
        return told(Birth(process.pid, log=str(log), kills=oom_kills()), watch and watch.status(), said)
    finally:
        if watch is not None:
            watch.close()


def told_by_this_kernel() -> bool:
    """Linux 6.15 and newer know the exit status of a process that is gone."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    watch = Watch(child.pid)
    child.communicate(b"\n")
    return watch.status() is not None


needs_kernel = pytest.mark.skipif(not told_by_this_kernel(), reason="this kernel forgets exit statuses")


@needs_kernel
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "it was killed by SIGKILL"),
        ("import os; os._exit(3)", "it ended with exit code 3"),
        ("import os; os.abort()", "it was killed by SIGABRT"),
        ("import ctypes; ctypes.CDLL(None)._exit(7)", "it ended with exit code 7"),
    ],
)
def test_the_exit_status_of_a_process_that_others_reaped_is_told(tmp_path: Path, code: str, said: str) -> None:
    assert ended(tmp_path, code) == said


def test_without_an_exit_status_the_log_tells_and_nothing_is_guessed(tmp_path: Path) -> None:
    crash = "import faulthandler, ctypes; faulthandler.enable(); ctypes.string_at(0)"
    assert ended(tmp_path, crash, watched=False).startswith(
        "it was killed by SIGSEGV; its log ends: Fatal Python error"
    )
    leave = "import os; from flowalign.record.death import say_hard_exits as s; s(); s(); os._exit(5)"
    said = ended(tmp_path, leave, watched=False)
    assert said == "it ended with exit code 5; its log ends: os._exit(5) at <string>, line 1"
    assert ended(tmp_path, "import os; os.kill(os.getpid(), 9)", watched=False) == NOTHING
    ray = "Worker exits unexpectedly. Worker exits with an exit code 4."
    assert ended(tmp_path, "raise SystemExit(4)", ray, watched=False) == "it ended with exit code 4"


def test_the_last_lines_of_the_log_are_shown_without_bars_and_rays_own(tmp_path: Path) -> None:
    log = tmp_path / "worker-1.err"
    log.write_text(":job_id:01000000\n:actor_name:A\nfirst\nLoading:  40%|####  | 4/10\nCUDA error\n\nlast words\n")
    assert told(Birth(1, log=str(log)), 9) == (
        "it was killed by SIGKILL; its log ends: first | CUDA error | last words"
    )
    log.write_text(":job_id:01000000\n")
    log.with_suffix(".out").write_text("printed last\n")
    assert told(Birth(1, log=str(log)), 9) == "it was killed by SIGKILL; its log ends: printed last"


def test_memory_is_named_where_the_kernels_counter_rose_and_only_there(tmp_path: Path) -> None:
    counter = tmp_path / "memory.events"
    counter.write_text("low 0\nhigh 0\nmax 31\noom 1\noom_kill 2\noom_group_kill 0\n")
    assert told(Birth(1, kills=(str(counter), 2)), 9) == "it was killed by SIGKILL"
    assert told(Birth(1, kills=(str(counter), 1)), 9) == (
        f"it was killed by SIGKILL; the kernel's OOM killer has struck in its memory cgroup ({counter}: oom_kill 1 "
        "before, 2 now)"
    )
    counter.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")  # cgroup v1
    assert "oom_kill 4 before, 5 now" in told(Birth(1, kills=(str(counter), 4)), None)
    counter.unlink()
    assert told(Birth(1, kills=(str(counter), 0)), None) == NOTHING


def test_rays_memory_monitor_is_named_with_what_its_node_held() -> None:
    said = """1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: 8) \
was 4.53GB used / 23.54GB limit (0.192284)
OOM kill reason: Memory usage 4809318400B exceeded threshold of 1263825792B (5.0% of 25276514304B limit)
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io."""
    assert told(Birth(1), 9, said) == "Ray's memory monitor killed it: 4.53GB used / 23.54GB limit"


def test_ends_of_one_kind_are_alike_whatever_their_process_and_its_last_words(tmp_path: Path) -> None:
    log, counter = tmp_path / "worker-1.err", tmp_path / "memory.events"
    log.write_text("last words\n")
    counter.write_text("oom_kill 2\n")
    killed = [ending(Birth(1, log=str(log)), 9), ending(Birth(2), 9)]
    starved = [ending(Birth(1, kills=(str(counter), 0)), 9), ending(Birth(2), 9, "the node running low on memory")]
    assert len({end.kind for end in killed}) == len({end.kind for end in starved}) == 1
    assert len({end.kind for end in (*killed, *starved, ending(Birth(1), 3 << 8), ending(Birth(1), None))}) == 4


def test_this_machine_has_a_counter_or_says_that_it_has_none() -> None:
    found = oom_kills()
    assert found is None or (Path(found[0]).is_file() and found[1] >= 0)
    assert Birth.of_this_process("node").kills == found


def test_an_import_that_failed_on_a_worker_arrives_as_an_import_error() -> None:
    said = """The actor died because of an error raised in its creation task, ray::LearnerActor.__init__()
RuntimeError: The actor with name LearnerActor failed to import on the worker. This may be because needed library:

Traceback (most recent call last):
  File "/x/site-packages/ray/_private/function_manager.py", line 678, in _load_actor_class_from_gcs
    actor_class = pickle.loads(pickled_class)
  File "/x/flowalign/cluster/actors.py", line 20, in <module>
    import peft
ModuleNotFoundError: No module named 'peft'"""
    with pytest.raises(ImportError, match=r"ModuleNotFoundError: No module named 'peft' \(in /x/flowalign/cluster/act"):
        raise_failed_import(RuntimeError(said))
    assert issubclass(WorkerImportError, ImportError)
    assert raise_failed_import(RuntimeError("anything else")) is None


def test_hard_exits_of_children_say_nothing() -> None:
    code = "import os; from flowalign.record.death import say_hard_exits as s; s(); os.fork() or os._exit(1); os.wait()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
