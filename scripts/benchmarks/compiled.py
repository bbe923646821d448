"""What ``learner.compile`` gives an alignment and what it costs, against the same run without.

Runs of the quickstart's model in one process, one after the other: with an empty cache of torch's compiler, then plain
and compiled in turn with the cache that the first has filled. Prints one JSON object: seconds of the first iteration
and the median of the others, by phase; the ratio of each turn, with its median; after how many iterations compiling has
paid for itself, with the cache and without; and the largest replay error of all runs. Nothing else may run beside it.

    python scripts/benchmarks/compiled.py --threads 2 --out scripts/benchmarks/results/compiled.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from cells import align, machine, positive, write

from flowalign.record.metrics import read_metrics

PHASES = {"iteration": "time/iteration_s", "rollout": "time/rollout_s", "learn": "time/learn_s"}


def run(name: str, compiled: bool, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One alignment: seconds of its first iteration, medians of the others, its replay error and transitions."""
    changes = {"iterations": options.iterations, "evaluation.every": 0, "checkpoint.keep_best": 0}
    changes |= {"checkpoint.best_metric": "reward/total/mean", "learner.compile": compiled}
    made = align(options.config, changes, options.threads, folder, name)
    rows = read_metrics(made / "metrics.jsonl")
    later = {phase: statistics.median(row[key] for row in rows[1:]) for phase, key in PHASES.items()}
    first = {phase: rows[0][key] for phase, key in PHASES.items()}
    return {"first": first, "later": later, "replay": max(row["replay/max_abs_dlogp"] for row in rows)}


def pays_after(compiled: dict[str, Any], plain: dict[str, Any]) -> int | None:
    """Iterations after which the first one's delay is made up for; None: never."""
    saved = plain["later"]["iteration"] - compiled["later"]["iteration"]
    lost = compiled["first"]["iteration"] - plain["first"]["iteration"]
    return 1 + math.ceil(lost / saved) if saved > 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="grpo_guard", help="under configs/shapes (grpo_guard)")
    parser.add_argument("--iterations", type=positive, default=8, help="of each run (8)")
    parser.add_argument("--turns", type=positive, default=3, help="runs of each kind with the cache (3)")
    parser.add_argument("--threads", type=positive, default=2, help="of a run (2)")
    parser.add_argument("--out", type=Path, help="a JSON file, beside what is printed")
    options = parser.parse_args()
    if options.iterations < 2:
        parser.error("--iterations: 2 or more, since the first one compiles")
    folder = Path(tempfile.mkdtemp(prefix="compiled-"))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
    try:
        cold, turns = run("cold", True, options, folder), []
        for turn in range(options.turns):
            plain, compiled = (run(f"{turn}-{kind}", kind, options, folder) for kind in (False, True))
            ratios = {phase: plain["later"][phase] / compiled["later"][phase] for phase in PHASES}
            turns.append({"plain": plain, "compiled": compiled, "faster": ratios})
    finally:
        shutil.rmtree(folder)
    warm, plain = turns[-1]["compiled"], turns[-1]["plain"]
    runs = [cold, *(turn[kind] for turn in turns for kind in ("plain", "compiled"))]
    found = {
        "machine": machine(options.threads),
        "config": f"configs/shapes/{options.config}.yaml",
        "iterations": options.iterations,
        "faster": {phase: statistics.median(turn["faster"][phase] for turn in turns) for phase in PHASES},
        "pays_after": {"cold": pays_after(cold, plain), "warm": pays_after(warm, plain)},
        "replay": max(own["replay"] for own in runs),
        "cold": cold,
        "turns": turns,
    }
    print(json.dumps(found, indent=1))
    if options.out is not None:
        write(options.out, found)


if __name__ == "__main__":
    main()
