"""Whole runs on a GPU by the backend `local`: one that was killed and resumed against one that was not; the quickstart.

    python scripts/benchmarks/gpu_runs.py [--deterministic] CONFIG [override ...]

is an alignment as a process that can be killed. With ``--deterministic`` torch takes kernels that sum in a fixed order,
and says of which operation there is none.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cells import ROOT, local
from gpu_bench import Absent, Bench, Figure, difference
from rich.console import Console
from safetensors.torch import load_file

from flowalign.intake.file import load_align
from flowalign.record.holder import RunDirectoryError
from flowalign.record.metrics import read_metrics, without_times
from flowalign.record.stop import EndedEarly, ask_to_stop
from flowalign.run.drive import drive

CONFIG = ROOT / "configs" / "shapes" / "flow_grpo.yaml"
WORKSPACE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # without it cuBLAS has no deterministic kernels
NO_KERNEL = re.compile(r"(\S+) does not have a deterministic implementation")
KILLED_AT = 2  # the checkpoint
LOOK_EVERY_S = 0.02
LAST_S = 5  # of the budget, for what comes after the quickstart's last iteration
PHASES = ("iteration_s", "rollout_s", "score_s", "learn_s", "sync_s")
STRICT = "eval/geneval_strict/overall"


def resume(bench: Bench) -> Iterator[Figure]:
    """A run that was killed and resumed, against one that was not: all bits of its weights and of its metrics."""
    for deterministic in (False, True):
        name = "deterministic kernels" if deterministic else "kernels as they are"
        yield Figure(name, 60, partial(_resumed, bench, deterministic=deterministic))


def _resumed(bench: Bench, *, deterministic: bool) -> dict[str, Any]:
    size = bench.size
    group = min(8, size.images // 2)
    wanted = {
        "iterations": size.iterations,
        "data.groups_per_iteration": size.images // group,
        "algorithm.group_size": group,
        "rewards": ["jpeg"],  # tells any two pictures apart, so that every iteration learns
        "rollout.chunk_size": size.images,
        "learner.micro_batch_size": size.images,
        "evaluation.every": 0,
        "checkpoint.every": 1,
    }
    runs = bench.folder / f"runs-{'deterministic' if deterministic else 'plain'}"
    make = _killed if size.kills else _cut_short
    lacking = make(bench, wanted, runs, deterministic)
    rows = [[without_times(row) for row in read_metrics(runs / name / "metrics.jsonl")] for name in ("whole", "broken")]
    last = f"checkpoints/step_{size.iterations:06d}/model.safetensors"
    whole, broken = (load_file(runs / name / last) for name in ("whole", "broken"))
    differ = [a["iteration"] for a, b in zip(*rows, strict=True) if a != b]
    return {
        "killed": size.kills,
        "weights": difference(*(torch.cat([of[name].flatten() for name in whole]) for of in (broken, whole))),
        "metrics_bitwise": not differ,
        "first_iteration_that_differs": min(differ, default=None),
        "transitions": sum(row["learner/transitions"] for row in rows[0]),
        "max_abs_dlogp": max(row.get("replay/max_abs_dlogp", 0.0) for row in rows[0]),
        **({"operations_without_deterministic_kernels": lacking} if deterministic else {}),
    }


def _killed(bench: Bench, wanted: Mapping[str, Any], runs: Path, deterministic: bool) -> list[str]:
    """Let one run end, kill another beside it, and resume that; return the operations that lack kernels."""
    started = {name: _process(bench, wanted, runs, name, deterministic) for name in ("whole", "broken")}
    try:
        _kill_at(bench, started["broken"], runs / "broken" / "checkpoints" / f"step_{KILLED_AT:06d}")
        _wait(bench, started["whole"], runs / "whole.log")
        started["again"] = _process(bench, wanted, runs, "broken", deterministic)
        _wait(bench, started["again"], runs / "broken.log")
    finally:
        for process in started.values():
            process.kill()
    return sorted(set(NO_KERNEL.findall((runs / "whole.log").read_text())))


def _process(
    bench: Bench, wanted: Mapping[str, Any], runs: Path, name: str, deterministic: bool
) -> subprocess.Popen[bytes]:
    runs.mkdir(exist_ok=True)
    flag = ["--deterministic"] if deterministic else []
    command = [sys.executable, __file__, *flag, str(CONFIG), *_words(bench, wanted, runs, name)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **(WORKSPACE if deterministic else {}), "PYTHONPATH": os.pathsep.join(paths)}
    with (runs / f"{name}.log").open("a") as said:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)


def _kill_at(bench: Bench, process: subprocess.Popen[bytes], checkpoint: Path) -> None:
    """Kill a process once it has written a checkpoint, which appears whole."""
    while not checkpoint.exists():
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with {process.returncode} before it could be killed")
        if bench.left() <= 0:
            raise Absent(f"no time left: the run that is to be killed has not reached {checkpoint.name}")
        time.sleep(LOOK_EVERY_S)
    process.kill()
    if process.wait() == 0:
        raise RuntimeError("the run had ended before it was killed; give it more iterations")


def _wait(bench: Bench, process: subprocess.Popen[bytes], log: Path) -> None:
    try:
        code = process.wait(timeout=max(bench.left(), 1))
    except subprocess.TimeoutExpired:
        raise Absent(f"no time left: the run of {log.stem} has not ended") from None
    if code:
        said = log.read_text().splitlines() or [""]
        raise RuntimeError(f"a run ended with {code}: {said[-1]}")


def _cut_short(bench: Bench, wanted: Mapping[str, Any], runs: Path, deterministic: bool) -> list[str]:
    """Do the same in this process, without a kill: the broken run ends after its first iteration and goes on."""
    with _kernels(deterministic) as said:
        for name, iterations in (("whole", wanted["iterations"]), ("broken", 1), ("broken", wanted["iterations"])):
            _align(_words(bench, {**wanted, "iterations": iterations}, runs, name))
    return sorted(set(NO_KERNEL.findall(" ".join(str(warning.message) for warning in said))))


@contextlib.contextmanager
def _kernels(deterministic: bool) -> Iterator[list[warnings.WarningMessage]]:
    """Take deterministic kernels inside, if asked to, and give the warnings of operations that have none."""
    with warnings.catch_warnings(record=True) as said:
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        try:
            yield said
        finally:
            torch.use_deterministic_algorithms(False)


def _words(bench: Bench, wanted: Mapping[str, Any], runs: Path, name: str) -> list[str]:
    return local({"cluster.device": str(bench.device), **wanted}, bench.threads, runs, name)


def _align(words: Sequence[str], config: Path = CONFIG, *, quiet: bool = True) -> Path:
    loaded = load_align(config, words)
    return drive(loaded.config, loaded.base_dir, Console(quiet=quiet))


def quickstart(bench: Bench) -> Iterator[Figure]:
    """The quickstart with fewer iterations: seconds of an iteration and its phases, the reward, GenEval's verdict."""
    yield Figure("flow_grpo", 60, partial(_shortened, bench))


def _shortened(bench: Bench) -> dict[str, Any]:
    """Run it; when the budget is nearly spent, ask it to end after the iteration under way."""
    runs = bench.folder / "runs"
    ending = threading.Timer(max(bench.left() - LAST_S, 1), partial(_ask_to_end, runs / "quickstart"))
    ending.daemon = True
    ending.start()
    began = time.monotonic()
    try:
        with bench.peak() as found, contextlib.suppress(EndedEarly):
            _align(_words(bench, bench.size.quickstart, runs, "quickstart"))
    finally:
        ending.cancel()
    took = time.monotonic() - began
    rows = read_metrics(runs / "quickstart" / "metrics.jsonl")
    done = [row for row in rows if row["iteration"] > 0]
    strict = [row[STRICT] for row in rows if STRICT in row]
    rewards = [row["reward/total/mean"] for row in done]
    return {
        "iterations": len(done),
        "first_iteration_s": done[0]["time/iteration_s"],
        **{name: statistics.median(row[f"time/{name}"] for row in done[1:] or done) for name in PHASES},
        "all_s": took,
        "peak_bytes": found["bytes"],
        "images_per_s": statistics.median(row["throughput/images_per_s"] for row in done[1:] or done),
        "max_abs_dlogp": max(row.get("replay/max_abs_dlogp", 0.0) for row in done),
        "reward": [statistics.fmean(part) for part in (rewards[:3], rewards[-3:])],
        "geneval_strict": strict,
    }


def _ask_to_end(run: Path) -> None:
    with contextlib.suppress(RunDirectoryError):  # it has not begun, or has ended
        ask_to_stop(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    torch.use_deterministic_algorithms(asked.deterministic, warn_only=True)
    _align(asked.overrides, asked.config, quiet=False)


if __name__ == "__main__":
    main()
