"""Which algorithm to use: each aligns the shipped model for the same time on the same machine.

A run is a function of its configuration and seed, whatever else the machine does; only its speed is not. So seconds
are measured apart from learning: ``time`` measures an iteration of every cell, one after the other, on an idle machine,
``run`` aligns for as many iterations as then fit into ``--minutes`` and writes one JSON file a cell, ``table`` writes
the table and the curves of all cells there are into docs/, ``compare`` sets their order beside the published ones of
published.json (algorithms_compared.py says how) and writes it into docs/wind_tunnel.md. A cell that was killed
continues where it was, a finished one is left alone.

    python scripts/benchmarks/algorithms.py time
    python scripts/benchmarks/algorithms.py run --cells flow_grpo,nft --seeds 0
    python scripts/benchmarks/algorithms.py table
    python scripts/benchmarks/algorithms.py compare
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import algorithms_compared
import algorithms_table
from cells import GOLD, HELD_OUT, OFFICIAL, RESULTS, ROOT, STRICT, TASKS, align, insert, machine, write

from flowalign.intake.file import load_align
from flowalign.record.metrics import read_metrics

OWN = RESULTS / "algorithms"
TIMED_ITERATIONS = 5
EVALUATIONS = 4


@dataclass(frozen=True)
class Cell:
    """A configuration under configs/shapes, and what differs from it."""

    config: str
    title: str
    overrides: Mapping[str, Any] = field(default_factory=dict)


CELLS = {
    "flow_grpo": Cell("flow_grpo", "Flow-GRPO, random window of 3"),
    "flow_grpo_full": Cell("flow_grpo", "Flow-GRPO, all 10 steps", {"algorithm.window": {"kind": "full"}}),
    "flow_grpo_fast": Cell("flow_grpo_fast", "Flow-GRPO-Fast"),
    "mix_grpo": Cell("mix_grpo", "MixGRPO"),
    "grpo_guard": Cell("grpo_guard", "GRPO-Guard"),
    "g2rpo": Cell("g2rpo", "G²RPO"),
    "nft": Cell("nft", "DiffusionNFT"),
    "awm": Cell("awm", "AWM"),
    "awm_free": Cell("awm", "AWM without a KL", {"algorithm.beta": 0, "algorithm.reference_refresh": None}),
    "sft": Cell("sft", "Online SFT without a KL, best of 8", {"algorithm.beta": 0}),
    "rwr": Cell(
        "sft",
        "Reward-weighted regression without a KL",
        {"algorithm.select": "rwr", "algorithm.timesteps": 3, "algorithm.beta": 0},
    ),
    "dpo_online": Cell("dpo_online", "Diffusion-DPO, online"),
}
TITLES = {name: cell.title for name, cell in CELLS.items()}


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds, images and transitions of an iteration: medians without the first, which warms up."""
    more = {"iterations": TIMED_ITERATIONS, "evaluation.every": 0, "checkpoint.resume": "never"}
    more |= {"checkpoint.best_metric": "reward/total/mean", "checkpoint.keep_best": 0}
    cell = CELLS[name]
    run = align(cell.config, {**cell.overrides, **more}, options.threads, options.work_dir / "time", name)
    rows = read_metrics(run / "metrics.jsonl")[1:]
    keys = {"iteration_s": "time/iteration_s", "rollout_s": "time/rollout_s", "learn_s": "time/learn_s"}
    measured = {key: statistics.median(row[source] for row in rows) for key, source in keys.items()}
    measured["transitions"] = statistics.median(row["learner/transitions"] for row in rows)
    measured["images"] = float(round(rows[0]["throughput/images_per_s"] * rows[0]["time/iteration_s"]))
    return measured


def time_cells(options: argparse.Namespace) -> None:
    path = OWN / "seconds.json"
    known = json.loads(path.read_text())["cells"] if path.exists() else {}
    for name in options.cells:
        known[name] = measure(name, options)
        print(json.dumps({"cell": name, **known[name]}), flush=True)
        write(path, {"machine": machine(options.threads), "cells": known})


def run_cells(options: argparse.Namespace) -> None:
    seconds = json.loads((OWN / "seconds.json").read_text())["cells"]
    for seed in options.seeds:
        for name in options.cells:
            target = OWN / f"{name}-seed{seed}.json"
            if target.exists():
                continue
            write(target, run_cell(name, seed, seconds[name]["iteration_s"], options))
            print(json.dumps({"cell": name, "seed": seed, "file": str(target.relative_to(ROOT))}), flush=True)


def run_cell(name: str, seed: int, iteration_s: float, options: argparse.Namespace) -> dict[str, Any]:
    """One alignment from start to end; the learning rate falls over exactly its iterations."""
    cell = CELLS[name]
    every = max(1, round(options.minutes * 60 / iteration_s / EVALUATIONS))
    config = load_align(ROOT / "configs" / "shapes" / f"{cell.config}.yaml").config
    updates = config.learner.updates_per_iteration * config.learner.epochs
    more: dict[str, Any] = {
        "seed": seed,
        "iterations": every * EVALUATIONS,
        "learner.optimizer.decay_steps": every * EVALUATIONS * updates,
        "evaluation.every": every,
        "evaluation.gold": [HELD_OUT],
        "checkpoint.every": every,
    }
    run = align(cell.config, {**cell.overrides, **more}, options.threads, options.work_dir, f"{name}-seed{seed}")
    rows = read_metrics(run / "metrics.jsonl")
    return {
        "cell": name,
        "config": f"configs/shapes/{cell.config}.yaml",
        "overrides": dict(cell.overrides),
        "learning_rate": config.learner.optimizer.learning_rate,
        "seed": seed,
        "minutes": options.minutes,
        "machine": machine(options.threads),
        "wall_s": rows[-1]["wall_s"],
        "points": points(rows),
    }


def points(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each evaluation found, and what had been used by then."""
    found, images, transitions = [], 0, 0
    for row in rows:
        images += round(row.get("throughput/images_per_s", 0) * row.get("time/iteration_s", 0))
        transitions += int(row.get("learner/transitions", 0))
        if STRICT not in row:
            continue
        scores = {key: row[key] for key in (STRICT, OFFICIAL, GOLD)}
        scores |= {f"eval/geneval_strict/{task}": row[f"eval/geneval_strict/{task}"] for task in TASKS}
        found.append({"iteration": row["iteration"], "images": images, "transitions": transitions, **scores})
    return found


def write_table(options: argparse.Namespace) -> None:
    cells = algorithms_table.load(OWN, TITLES)
    algorithms_table.curves(cells, ROOT / "docs" / "figures" / "algorithms.png")
    table = algorithms_table.markdown(cells)
    insert(table, ROOT / "docs" / "algorithms.md", algorithms_table.BEGIN, algorithms_table.END)
    print(table)


def compared() -> tuple[dict[str, Any], str]:
    """Return what the comparison of all cells there are finds, and its tables; all at the time the shortest has."""
    cells = algorithms_table.load(OWN, TITLES)
    if not cells:
        raise SystemExit(f"{OWN} has no cells; `run` measures them")
    minutes = min(cell["minutes"] for cell in cells)
    scores: dict[str, list[float]] = {}
    for cell in cells:
        scores.setdefault(cell["cell"], []).append(algorithms_table.at(60 * minutes, cell["points"], STRICT))
    samples = min(load_align(ROOT / path).config.evaluation.num_samples for path in {cell["config"] for cell in cells})
    studies = algorithms_compared.read_studies(CELLS)
    found = algorithms_compared.compare(studies, scores, samples)
    return found, algorithms_compared.markdown(studies, found, TITLES, minutes)


def write_compared(options: argparse.Namespace) -> None:
    found, tables = compared()
    print(json.dumps(found))
    insert(tables, ROOT / "docs" / "wind_tunnel.md", algorithms_compared.BEGIN, algorithms_compared.END)
    print(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "run", "table", "compare"))
    parser.add_argument("--cells", type=lambda text: text.split(","), default=list(CELLS), help="names, with commas")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "algorithms")
    options = parser.parse_args()
    unknown = sorted(set(options.cells) - set(CELLS))
    if unknown:
        parser.error(f"--cells: no cell {unknown[0]!r}; there are {', '.join(CELLS)}")
    {"time": time_cells, "run": run_cells, "table": write_table, "compare": write_compared}[options.what](options)


if __name__ == "__main__":
    main()
