"""Who gets a run directory, and what signals and kills leave in it: prints one JSON object.

``races``: light processes take directories that nobody holds, or a process that was killed. ``starts``: two runs of one
name at once. ``kills``: a run killed at a random moment, then the same command. ``signals``: one signal at a random
moment, then the same command. Runs are compared bit for bit with an undisturbed one. ``--warm`` forks them from a
process that has imported what they need, so that more of the moments fall into the work.

    python scripts/benchmarks/run_directories.py races --trials 1000
    python scripts/benchmarks/run_directories.py starts kills signals --trials 50
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
RACERS = 4
WARM: list[bool] = []
RACER = """
import sys
from pathlib import Path
from flowalign.record.lock import RunHeld, RunLock
for line in sys.stdin:
    try:
        lock = RunLock.take(Path(line.strip()))
        print("taken over" if lock.said else "taken", flush=True)
    except RunHeld:
        print("refused", flush=True)
"""
CONFIG: dict[str, Any] = {
    "name": "t",
    "iterations": 3,
    "model": {"path": "shapes", "dtype": "float32", "max_sequence_length": 2},
    "data": {"prompts": "shapes:train", "groups_per_iteration": 2},
    "algorithm": {"type": "flow_grpo", "group_size": 2, "num_steps": 4, "window": {"kind": "random", "size": 2}},
    "rewards": [{"spec": "geneval"}],
    "rollout": {"chunk_size": 4, "decode_batch_size": 4},
    "learner": {"engine": "torch", "micro_batch_size": 4},
    "cluster": {"backend": "local", "threads": 1},
    "evaluation": {"every": 0},
    "checkpoint": {"every": 1},
    "logging": {"wandb": "disabled"},
}


def races(folder: Path, trials: int, chance: random.Random) -> dict[str, Any]:
    """Directories for which ``RACERS`` processes ask at once; a third of them held by a process that was killed."""
    racers = [_python(RACER) for _ in range(RACERS)]
    wrong, free, left = [], 0, 0
    for trial in range(trials):
        run_dir = folder / str(trial)
        if held := trial % 3 == 0:
            dead = _python(RACER)
            _ask(dead, run_dir)
            _answer(dead)
            dead.kill()
            dead.communicate()
        for racer in chance.sample(racers, RACERS):
            _ask(racer, run_dir)
        answers = Counter(_answer(racer) for racer in racers)
        free, left = free + (not held), left + held
        if answers != {"taken over" if held else "taken": 1, "refused": RACERS - 1}:
            wrong.append(dict(answers))
    for racer in racers:
        racer.communicate()
    return {"racers": RACERS, "nobody held": free, "a killed process held": left, "not exactly one": wrong}


def starts(folder: Path, trials: int, chance: random.Random) -> dict[str, Any]:
    whole, _ = _undisturbed(folder)
    codes, wrong = Counter(), []
    for trial in range(trials):
        both = [_align(folder, f"start{trial}") for _ in range(2)]
        ended = sorted(process.wait() for process in both)
        codes[str(ended)] += 1
        if ended != [0, 2] or _trace(folder, f"start{trial}") != whole:
            wrong.append(trial)
        _forget(folder, f"start{trial}")
    return {"exit codes": dict(codes), "wrong": wrong}


def kills(folder: Path, trials: int, chance: random.Random) -> dict[str, Any]:
    whole, seconds = _undisturbed(folder)
    wrong, taken_over = [], 0
    for trial in range(trials):
        name = f"kill{trial}"
        process = _align(folder, name)
        time.sleep(chance.uniform(0, seconds))
        process.kill()
        process.wait()
        left = (folder / "runs" / name / "lock").exists()
        code = _align(folder, name).wait()
        said = "which is gone: taken over" in (folder / f"{name}.log").read_text()
        taken_over += said
        if code != 0 or said != left or _trace(folder, name) != whole:
            wrong.append({"trial": trial, "code": code, "lock left": left, "said": said})
        _forget(folder, name)
    return {"locks left and taken over": taken_over, "wrong": wrong}


def signals(folder: Path, trials: int, chance: random.Random) -> dict[str, Any]:
    whole, seconds = _undisturbed(folder)
    codes, wrong = Counter(), []
    for trial in range(trials):
        name, number = f"signal{trial}", chance.choice((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP))
        process, moment = _align(folder, name), chance.uniform(0, seconds)
        time.sleep(moment)
        process.send_signal(number)
        code = process.wait()
        # Python needs some tenths of a second before it hears any signal in our way; there is nothing then.
        early = code == -number and not (folder / "runs" / name).exists()
        codes["before Python was up" if early else str(code)] += 1
        left = (folder / "runs" / name / "lock").exists()
        again = _align(folder, name).wait()
        if not (early or code in (0, 75)) or left or again != 0 or _trace(folder, name) != whole:
            wrong.append({"signal": number.name, "after_s": round(moment, 2), "code": code, "again": again})
        _forget(folder, name)
    return {"exit codes": dict(codes), "wrong": wrong}


def _python(code: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(racer: subprocess.Popen[str], run_dir: Path) -> None:
    assert racer.stdin is not None
    racer.stdin.write(f"{run_dir}\n")
    racer.stdin.flush()


def _answer(racer: subprocess.Popen[str]) -> str:
    assert racer.stdout is not None
    return racer.stdout.readline().strip()


class Forked:
    """``flowalign`` with ``arguments`` in a copy of this process."""

    def __init__(self, arguments: list[str], log: int) -> None:
        self.pid = os.fork()
        if self.pid:
            return
        code: Any = 1
        try:
            from flowalign.cli import app

            os.dup2(log, 1)
            os.dup2(log, 2)
            app(arguments, prog_name="flowalign")
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code or 0)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _warm_up() -> None:
    """Import what a run imports, on one thread, since threads do not survive a fork."""
    import torch

    torch.set_num_threads(1)
    WARM.append(True)


def _align(folder: Path, name: str) -> Any:
    config = folder / "t.yaml"
    draft = folder / f"{name}.yaml"
    draft.write_text(yaml.safe_dump(CONFIG))
    draft.replace(config)
    arguments = ["align", str(config), f"name={name}", f"runs_dir={folder}/runs"]
    with (folder / f"{name}.log").open("ab") as log:
        if WARM:
            return Forked(arguments, log.fileno())
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "flowalign.cli", *arguments]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def _undisturbed(folder: Path) -> tuple[Any, float]:
    """The trace of a run that nobody disturbs, and its seconds."""
    began = time.monotonic()
    assert _align(folder, "whole").wait() == 0
    seconds = time.monotonic() - began
    trace = _trace(folder, "whole")
    _forget(folder, "whole")
    return trace, seconds


def _trace(folder: Path, name: str) -> Any:
    """The rows of the metrics without times, and the hash of each file of the last checkpoint but its state's times."""
    from flowalign.record.metrics import read_metrics, without_times

    run_dir = folder / "runs" / name
    rows = [without_times(row) for row in read_metrics(run_dir / "metrics.jsonl")]
    last = run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text().strip()
    files = json.loads((last / "MANIFEST.json").read_text())["files"]
    return rows, last.name, {file: found["sha256"] for file, found in files.items() if file.endswith(".safetensors")}


def _forget(folder: Path, name: str) -> None:
    shutil.rmtree(folder / "runs" / name)


def main() -> None:
    kinds = {kind.__name__: kind for kind in (races, starts, kills, signals)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="+", choices=kinds)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm", action="store_true")
    asked = parser.parse_args()
    if asked.warm:
        _warm_up()
    result: dict[str, Any] = {"trials": asked.trials, "seed": asked.seed, "warm": asked.warm}
    for kind in asked.kinds:
        with tempfile.TemporaryDirectory() as folder:
            result[kind] = kinds[kind](Path(folder), asked.trials, random.Random(asked.seed))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
