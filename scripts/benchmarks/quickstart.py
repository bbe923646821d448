"""The quickstart's seconds an iteration and peak memory, this checkout and another commit taking turns.

    python scripts/benchmarks/quickstart.py --against COMMIT [--tries 3] [override ...] > quickstart.json
    python scripts/benchmarks/quickstart.py --training --against COMMIT latents=BANK model.path=DIR [override ...]

Each try runs ``flowalign align configs/shapes/flow_grpo.yaml`` without evaluations, or ``flowalign pretrain
configs/shapes/pretrain.yaml``, in a process of its own; overrides are handed to both.
The first iteration warms up and is left out. Memory is the sum of the processes' private and shared shares (PSS),
looked at every half second. Prints one JSON object: medians of both checkouts, of the phases too, all that was
measured, and the ratio of this checkout to the other one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from cells import machine

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
PHASES = ("iteration_s", "rollout_s", "score_s", "learn_s", "sync_s")
ALIGN = ("align", "flow_grpo.yaml", "evaluation.every=0")
TRAIN = ("pretrain", "pretrain.yaml", "logging.every=1")


def pss(process: psutil.Process) -> int:
    """Bytes that a process and those below it hold."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def run(checkout: Path, what: tuple[str, str, str], overrides: list[str]) -> dict[str, Any]:
    """Run once; seconds of each iteration but the first, and the most memory in MiB."""
    command, file, own = what
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "flowalign.cli", command, str(checkout / "configs" / "shapes" / file)]
        line += [own, "name=timed", f"runs_dir={folder}", *overrides]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        process = psutil.Popen(
            line, cwd=checkout, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, pss(process))
            time.sleep(0.5)
        if process.returncode:
            raise SystemExit(f"{' '.join(line)} ended with {process.returncode}: {process.stderr.read()[-2000:]}")
        rows = [json.loads(row) for row in Path(folder, "timed", "metrics.jsonl").read_text().splitlines()]
    if what is TRAIN:  # by the clock of the rows, which every version has
        seconds = [{"iteration_s": row["wall_s"] - before["wall_s"]} for before, row in pairwise(rows)]
    else:
        seconds = [{key: row[f"time/{key}"] for key in PHASES} for row in rows[1:]]
    return {"rows": seconds, "peak_mib": round(peak / MIB, 1)}


def summary(tries: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [row for one in tries for row in one["rows"]]
    return {
        **{key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]},
        "iteration_s_all": [round(row["iteration_s"], 3) for row in rows],
        "peak_mib": statistics.median(one["peak_mib"] for one in tries),
        "peak_mib_all": [one["peak_mib"] for one in tries],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, help="a commit, or the folder of a checkout")
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--training", action="store_true", help="train on latents instead of aligning")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    what = TRAIN if options.training else ALIGN
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        named = Path(options.against)
        other = named if named.is_dir() else Path(folder, "other")
        if not named.is_dir():
            subprocess.run([*git, "add", "--detach", str(other), options.against], check=True, capture_output=True)
        try:
            tries: dict[str, list[dict[str, Any]]] = {"before": [], "now": []}
            for _ in range(options.tries):
                tries["before"].append(run(other, what, options.overrides))
                tries["now"].append(run(ROOT, what, options.overrides))
        finally:
            if not named.is_dir():
                subprocess.run([*git, "remove", "--force", str(other)], check=True)
    found = {side: summary(made) for side, made in tries.items()}
    ratios = {
        key: round(found["now"][key] / found["before"][key], 4) for key in found["now"] if not key.endswith("_all")
    }
    told = {"machine": machine(os.cpu_count() or 1), "against": options.against, "overrides": options.overrides}
    print(json.dumps({**told, **found, "ratio": ratios}, indent=1))


if __name__ == "__main__":
    main()
