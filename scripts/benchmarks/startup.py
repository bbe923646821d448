"""Seconds from Enter to the first iteration of an alignment, by phase: on the clock, and of the CPU in all processes.

    python scripts/benchmarks/startup.py --against COMMIT --turns 5 --out scripts/benchmarks/results/startup.json
    python scripts/benchmarks/startup.py evaluation.num_samples=96 --config grpo_guard --backends local

A run is typed as a user types it; each line that it prints ends a phase, and it is asked to stop after its first
iteration. Both backends take turns, and with ``--against`` (a commit, or the folder of a checkout) both checkouts; one
run of each before them fills caches and is not counted. Seconds of the CPU are those of the command and of all that it
starts, looked at ten times a second: they tell more than the clock where the machine has other work. ``processes`` has
them by kind, until the model is loaded. Prints one JSON object: medians with the least and the most of all turns.
Nothing else may run beside it.

On a machine with other work set ``RAY_worker_niceness=0``, where ``--against`` is a commit that leaves it to Ray: by
itself Ray lets every other process go before its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from cells import ROOT, machine, positive, write

ENDS = {  # the phases, each with the beginning of the line that ends it
    "command": "flowalign ",
    "checks": "run directory: ",
    "ray": "Ray started",
    "load": "model: ",
    "record": "evaluation at iteration 0 begins",
    "evaluation": "evaluation at iteration 0: ",
    "iteration": "iteration 1/",
}
BACKENDS = ("local", "ray")
PROGRAM = str(Path(sys.executable).parent / "flowalign")
LOOK_S, PATIENCE_S = 0.1, 600.0


class Spent:
    """The CPU seconds of a process and of all that it has started, those included that ended meanwhile."""

    def __init__(self, process: psutil.Process) -> None:
        self._process, self._ended, self._lock = process, threading.Event(), threading.Lock()
        self._seconds: dict[tuple[int, float], tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._thread.start()

    def _look_on(self) -> None:
        while not self._ended.wait(LOOK_S):
            self.look()

    def look(self) -> float:
        with self._lock, contextlib.suppress(psutil.Error):
            for one in (self._process, *self._process.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    times = one.cpu_times()
                    self._seconds[one.pid, one.create_time()] = self._kind(one), times.user + times.system
        return sum(seconds for _, seconds in self._seconds.values())

    def _kind(self, process: psutil.Process) -> str:
        if process == self._process:
            return "command"
        first = (process.cmdline() or [""])[0]
        return first.removeprefix("ray::").partition(".")[0] if "Actor" in first else "Ray"

    def by_kind(self) -> dict[str, float]:
        kinds = sorted({kind for kind, _ in self._seconds.values()})
        return {kind: sum(s for of, s in self._seconds.values() if of == kind) for kind in kinds}

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


def environment(checkout: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": str(checkout), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def run(checkout: Path, backend: str, options: argparse.Namespace, last: str = "iteration") -> dict[str, Any]:
    """Begin a run and stop it once the phase ``last`` has ended; its seconds by phase."""
    phases = {name: line for name, line in ENDS.items() if backend == "ray" or name != "ray"}
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        own = [f"cluster.backend={backend}", f"cluster.threads={options.threads}", f"runs_dir={folder}"]
        words = [PROGRAM, "align", f"configs/shapes/{options.config}.yaml", *own, *options.overrides]
        took: dict[str, Any] = {"wall": {}, "cpu": {}, "processes": {}}
        began, spent_before, said = time.monotonic(), 0.0, []
        process = psutil.Popen(
            words,
            cwd=checkout,
            env=environment(checkout),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        spent = Spent(psutil.Process(process.pid))
        try:
            for line in process.stdout:
                said.append(line)
                ended = next((name for name, start in phases.items() if line.startswith(start)), None)
                if ended is None or ended in took["wall"]:
                    continue
                now, spent_now = time.monotonic(), spent.look()
                took["wall"][ended], took["cpu"][ended] = now - began, spent_now - spent_before
                began, spent_before = now, spent_now
                if ended == "load":
                    took["processes"] = spent.by_kind()
                if ended == last:
                    process.terminate()
            code = process.wait(PATIENCE_S)
        finally:
            spent.end()
            if process.poll() is None:
                process.terminate()
                process.wait(PATIENCE_S)
    if last not in took["wall"]:
        raise SystemExit(f"{' '.join(words)} ended with code {code} before its first iteration:\n{''.join(said[-20:])}")
    for clock in ("wall", "cpu"):
        took[clock]["start"] = sum(seconds for name, seconds in took[clock].items() if name != "iteration")
    return took


def asked_for_help(checkout: Path) -> dict[str, Any]:
    """The seconds of ``flowalign --help``."""
    began, before = time.monotonic(), os.times()
    subprocess.run([PROGRAM, "--help"], cwd=checkout, env=environment(checkout), check=True, stdout=subprocess.DEVNULL)
    after, wall = os.times(), time.monotonic() - began
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": {"help": wall}, "cpu": {"help": spent}}


def told(turns: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Medians with the least and the most, by clock and phase."""
    found: dict[str, Any] = {}
    for clock in turns[0]:
        names = [name for name in turns[0][clock] if all(name in turn[clock] for turn in turns)]
        values = {name: [turn[clock][name] for turn in turns] for name in names}
        found[clock] = {
            name: {"median": round(statistics.median(own), 3), "from": round(min(own), 3), "to": round(max(own), 3)}
            for name, own in values.items()
        }
    return found


@contextlib.contextmanager
def checkouts(against: str | None) -> Iterator[dict[str, Path]]:
    """This checkout, and beside it the one that it is compared with, a commit's for as long as it is needed."""
    if against is None or Path(against).is_dir():
        yield {"now": ROOT} | ({} if against is None else {"against": Path(against).resolve()})
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        other = Path(folder, "other")
        subprocess.run([*git, "add", "--detach", str(other), against], check=True, capture_output=True)
        try:
            yield {"now": ROOT, "against": other}
        finally:
            subprocess.run([*git, "remove", "--force", str(other)], check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="nft", help="under configs/shapes (nft)")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--against", help="a commit, or the folder of a checkout")
    parser.add_argument("--turns", type=positive, default=3, help="runs of each kind (3)")
    parser.add_argument("--threads", type=positive, default=2, help="of a run (2)")
    parser.add_argument("--out", type=Path, help="a JSON file, beside what is printed")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the configuration, for all runs")
    options = parser.parse_intermixed_args()
    if wrong := next((word for word in options.overrides if "=" not in word), None):
        parser.error(f"{wrong!r} is no KEY=VALUE")
    made: dict[str, dict[str, list[Any]]] = {}
    with checkouts(options.against) as sides:
        for checkout in sides.values():
            run(checkout, options.backends[0], options, last="load")
        for turn in range(options.turns):
            for side, checkout in [*sides.items()][:: 1 if turn % 2 else -1]:
                own = made.setdefault(side, {})
                own.setdefault("help", []).append(asked_for_help(checkout))
                for backend in options.backends:
                    own.setdefault(backend, []).append(run(checkout, backend, options))
    found = {side: {what: told(turns) for what, turns in own.items()} for side, own in sorted(made.items())}
    result: dict[str, Any] = {"machine": machine(options.threads), "config": f"configs/shapes/{options.config}.yaml"}
    result |= {"overrides": options.overrides, "turns": options.turns, "against": options.against, **found}
    if options.against is not None:
        result["saved"] = {
            what: {
                clock: round(
                    found["against"][what][clock][name]["median"] - found["now"][what][clock][name]["median"], 3
                )
                for clock in ("wall", "cpu")
            }
            for what, name in (("help", "help"), *((backend, "start") for backend in options.backends))
        }
    print(json.dumps(result, indent=1))
    if options.out is not None:
        write(options.out, result)


if __name__ == "__main__":
    main()
