"""Which algorithm to use: each aligns the shipped model for the same time on the same machine.

A run is a function of its configuration and seed, whatever else the machine does; only its speed is not. So seconds
are measured apart from learning: ``time`` measures an iteration of every cell, one after the other, on an idle machine,
``run`` aligns for as many iterations as then fit into ``--minutes`` and writes one JSON file a cell, ``table`` writes
the table and the curves of all cells there are into docs/, ``compare`` sets their order beside the published ones of
published.json (algorithms_compared.py says how) and writes it into docs/wind_tunnel.md, beside what ``changed`` since
the cells of another base. A cell that was killed continues where it was, a finished one is left alone.

    python scripts/benchmarks/algorithms.py time
    python scripts/benchmarks/algorithms.py run --cells flow_grpo,nft --seeds 0
    python scripts/benchmarks/algorithms.py table
    python scripts/benchmarks/algorithms.py compare
    python scripts/benchmarks/algorithms.py changed --against scripts/benchmarks/results/algorithms-base-1
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import algorithms_compared
import algorithms_table
from alignments import Budget, Cell, asked, ended_early, run_cell, time_cells
from cells import RESULTS, ROOT, STRICT, insert, minutes, positive, read, refuse_another, run_once, seeds

from flowalign.intake.file import load_align

OWN = RESULTS / "algorithms"
SECONDS = OWN / "seconds.json"

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


def measure_cells(options: argparse.Namespace) -> None:
    time_cells(SECONDS, {name: CELLS[name] for name in options.cells}, options)


def run_cells(options: argparse.Namespace) -> None:
    seconds, budget = read(SECONDS, "cells")["cells"], Budget(options.minutes)
    if lacking := [name for name in options.cells if name not in seconds]:
        raise SystemExit(f"{SECONDS} has no seconds of {', '.join(lacking)}: `time` first")
    for seed in options.seeds:
        for name in options.cells:
            wanted = asked(name, CELLS[name], seed, budget)
            del wanted["overrides"]  # what the search found came to the same settings by others
            refuse_another(OWN / f"{name}-seed{seed}.json", wanted)
            run = partial(run_cell, name, CELLS[name], seed, seconds[name]["iteration_s"], budget, options)
            run_once(OWN / f"{name}-seed{seed}.json", run, cell=name, seed=seed)


def write_table(options: argparse.Namespace) -> None:
    cells = algorithms_table.load(OWN, TITLES)
    algorithms_table.draw(cells, ROOT / "docs" / "figures" / "algorithms.png")
    table = algorithms_table.markdown(cells)
    insert(table, ROOT / "docs" / "algorithms.md", algorithms_table.BEGIN, algorithms_table.END)
    print(table)


def scores_of(directory: Path) -> tuple[dict[str, list[float]], float, int]:
    """Return the strict score of each seed of each algorithm, after how many minutes, and of how many samples.

    All at the time that the shortest cell has.
    """
    cells = algorithms_table.load(directory, TITLES)
    if not cells:
        raise SystemExit(f"{directory} has no cells; `run` measures them")
    minutes = min(cell["minutes"] for cell in cells)
    scores: dict[str, list[float]] = {}
    for cell in cells:
        scores.setdefault(cell["cell"], []).append(algorithms_table.at(60 * minutes, cell["points"], STRICT))
    files = {ROOT / cell["config"] for cell in cells}
    return scores, minutes, min(load_align(path).config.evaluation.num_samples for path in files)


def compared() -> tuple[dict[str, Any], str]:
    """Return what the comparison of all cells there are finds, and its tables."""
    scores, minutes, samples = scores_of(OWN)
    studies = algorithms_compared.read_studies(CELLS)
    found = algorithms_compared.compare(studies, scores, samples)
    return found, algorithms_compared.markdown(studies, found, TITLES, minutes)


def write_compared(options: argparse.Namespace) -> None:
    found, tables = compared()
    print(json.dumps(found))
    insert(tables, ROOT / "docs" / "wind_tunnel.md", algorithms_compared.BEGIN, algorithms_compared.END)
    print(tables)


def write_changed(options: argparse.Namespace) -> None:
    found = algorithms_compared.changed(scores_of(options.against.resolve())[0], scores_of(OWN)[0])
    print(json.dumps(found))
    table = algorithms_compared.changed_markdown(found, TITLES)
    insert(table, ROOT / "docs" / "wind_tunnel.md", algorithms_compared.CHANGED, algorithms_compared.CHANGED_END)
    print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "run", "table", "compare", "changed"))
    parser.add_argument("--cells", type=lambda text: text.split(","), help="names, with commas; by default all")
    parser.add_argument("--seeds", type=seeds, default=[0])
    parser.add_argument("--minutes", type=minutes, default=10)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "algorithms")
    parser.add_argument("--against", type=Path, default=OWN.with_name("algorithms-base-1"), help="of `changed`")
    options = parser.parse_args()
    if options.cells is not None and options.what in ("table", "compare", "changed"):
        parser.error(f"--cells: {options.what} takes all cells that were run; leave it out")
    options.cells = options.cells or list(CELLS)
    if unknown := sorted(set(options.cells) - set(CELLS)):
        parser.error(f"--cells: no cell {unknown[0]!r}; there are {', '.join(CELLS)}")
    written = {"table": write_table, "compare": write_compared, "changed": write_changed}
    with ended_early():
        ({"time": measure_cells, "run": run_cells} | written)[options.what](options)


if __name__ == "__main__":
    main()
