"""Table 1 of the SD3 report on shapes: formulations of the base training, one small model each.

Every cell trains the same fresh MM-DiT on the same latents for the same steps and draws the evaluation prompts with 5,
25 and 50 Euler steps (for the diffusion families that is DDIM), with its weights and with their average, without and
with guidance. In each of these 12 settings the formulations are sorted into fronts by FID and CLIP score, none of a
front being worse in both than another; a formulation's rank is its mean front. One JSON file a cell; a cell that was
killed continues where it was, a finished one is left alone. (arXiv:2403.03206, sec. 5.1 and table 1)

    python scripts/benchmarks/paths.py run --cells "rf/uniform;v/cos" --seeds 0
    python scripts/benchmarks/paths.py table
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cells import RESULTS, alike, base_digest, machine, of_this_base, positive, read, run_once, seeds, study
from pages import insert_table
from pictures import Judge, bank, opened, train

from flowalign.config.sections import SamplingConfig
from flowalign.record.metrics import read_metrics

OWN = RESULTS / "paths"
STEPS, WEIGHTS, GUIDANCE = (5, 25, 50), ("ema", "model"), (1.0, 3.0)
SETTINGS = tuple(product(STEPS, WEIGHTS, GUIDANCE))
CELLS: dict[str, dict[str, Any]] = {
    "rf/uniform": {"family": "rf", "density": "uniform"},
    "rf/lognorm(0.00, 1.00)": {"family": "rf", "density": "logit_normal", "density_params": {"m": 0.0, "s": 1.0}},
    "rf/lognorm(1.00, 0.60)": {"family": "rf", "density": "logit_normal", "density_params": {"m": 1.0, "s": 0.6}},
    "rf/mode(1.29)": {"family": "rf", "density": "mode", "density_params": {"s": 1.29}},
    "eps/linear": {"family": "eps/linear", "density": "uniform"},
    "v/cos": {"family": "v/cos", "density": "uniform"},
    "edm": {"family": "edm", "density": "uniform"},
    "rf/cosmap": {"family": "rf", "density": "cosmap"},
    **{
        name: {"family": name, "density": "uniform"}
        for name in ("v/linear", "eps/cos", "edm(0.00, 0.60)", "edm(0.60, 1.20)", "edm/rf", "edm/cos")
    },
}
MEASURED = list(CELLS)[:7]  # what a run without --cells trains, and docs/pretraining.md shows


def file_of(name: str, seed: int) -> Path:
    plain = "".join(c if c.isalnum() or c == "." else "_" for c in name)
    return OWN / f"{plain}-seed{seed}.json"


def run_cell(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    began = time.monotonic()
    latents = bank(options.work_dir / "bank", options.num_images, 0, options.threads)
    algorithm = CELLS[name]
    overrides: dict[str, Any] = {
        "seed": seed,
        "latents": str(latents),
        "model.family": algorithm["family"],
        "model.transformer.seed": seed,
        "algorithm.density_params": {},
        **{f"algorithm.{key}": value for key, value in algorithm.items()},
        "phases.0.iterations": options.steps,
        "checkpoint.every": max(1, options.steps // 4),
    }
    run = train("pretrain", "paths", overrides, options.threads, options.work_dir, file_of(name, seed).stem)
    trained = read_metrics(run / "metrics.jsonl")[-1]
    torch.set_num_threads(options.threads)
    judge, scores = Judge(options.num_samples), {}
    for weights in WEIGHTS:
        policy, _ = opened(run, weights)
        for steps, guidance in product(STEPS, GUIDANCE):
            sampling = SamplingConfig(num_steps=steps, guidance_scale=guidance)
            scores[key_of((steps, weights, guidance))] = judge(policy, sampling)
    return {
        "machine": machine(options.threads),
        "samples_per_s": trained["throughput/samples_per_s"],
        "seconds": round(time.monotonic() - began),
        "scores": scores,
    }


def asked(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What a cell is, apart from where it ran and what it found."""
    counts = {"steps": options.steps, "images": options.num_samples, "bank": options.num_images}
    return {"cell": name, "seed": seed, "base": base_digest(), **counts}


def key_of(setting: tuple[int, str, float]) -> str:
    steps, weights, guidance = setting
    return f"{steps} steps, {weights}, guidance {guidance:g}"


def fronts(points: Mapping[str, tuple[float, float]]) -> dict[str, int]:
    """The front of each point (FID, CLIP score), 1 for those that no other beats in one and equals in both."""
    left, front, found = dict(points), 0, {}
    while left:
        front += 1
        best = [name for name, own in left.items() if not any(_beats(other, own) for other in left.values())]
        found |= dict.fromkeys(best, front)
        left = {name: point for name, point in left.items() if name not in best}
    return found


def _beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[0] and a[1] >= b[1] and a != b


def ranks(cells: Sequence[Mapping[str, Any]], keep: Sequence[tuple[int, str, float]]) -> dict[str, float]:
    """The mean front of each formulation over the settings ``keep``, of cells of one seed."""
    sums: dict[str, list[int]] = {cell["cell"]: [] for cell in cells}
    for setting in keep:
        key = key_of(setting)
        points = {cell["cell"]: (cell["scores"][key]["fid"], cell["scores"][key]["clip"]) for cell in cells}
        for name, front in fronts(points).items():
            sums[name].append(front)
    return {name: statistics.mean(values) for name, values in sums.items()}


def load() -> dict[int, list[dict[str, Any]]]:
    """The cells there are, by seed, in the order of the table; all of one base."""
    cells = [read(path, "cell", "scores") for path in sorted(OWN.glob("*-seed*.json"))]
    alike(cells, OWN, "base", "steps", "images")
    by_seed: dict[int, list[dict[str, Any]]] = {}
    for cell in cells:
        by_seed.setdefault(cell["seed"], []).append(cell)
    order = list(CELLS)
    return {seed: sorted(cells, key=lambda cell: order.index(cell["cell"])) for seed, cells in by_seed.items()}


def markdown(by_seed: Mapping[int, Sequence[Mapping[str, Any]]]) -> str:
    """Of seed 0 all formulations; where some have further seeds, the ranks of these among themselves, a seed each.

    FID and CLIP score are the average's.
    """
    cells = by_seed[0]
    every = ranks(cells, SETTINGS)
    few = ranks(cells, [s for s in SETTINGS if s[0] == 5])
    many = ranks(cells, [s for s in SETTINGS if s[0] == 50])
    seeded = {cell["cell"] for seed, group in by_seed.items() if seed for cell in group}
    among = [ranks([c for c in group if c["cell"] in seeded], SETTINGS) for group in by_seed.values()]
    head = [
        "formulation",
        "rank",
        "at 5 steps",
        "at 50",
        "FID 5 / 25 / 50",
        "guidance 3: FID",
        "CLIP",
        *(["rank among these"] if seeded else []),
    ]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for cell in sorted(cells, key=lambda cell: every[cell["cell"]]):
        name = cell["cell"]
        fid = {g: " / ".join(f"{score(cell, n, g, 'fid'):.1f}" for n in STEPS) for g in GUIDANCE}
        clip = " / ".join(f"{score(cell, n, 3.0, 'clip'):.1f}" for n in STEPS)
        row = [name, *(f"{found[name]:.2f}" for found in (every, few, many)), fid[1.0], fid[3.0], clip]
        if seeded:
            row.append(" / ".join(f"{found[name]:.2f}" for found in among if name in found) if name in seeded else "–")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def score(cell: Mapping[str, Any], steps: int, guidance: float, metric: str) -> float:
    return cell["scores"][key_of((steps, "ema", guidance))][metric]


def main() -> None:
    parser = study(__doc__, "paths", CELLS, MEASURED)
    parser.add_argument("--seeds", type=seeds, default=[0])
    parser.add_argument("--steps", type=positive, default=1500)
    parser.add_argument("--num-samples", type=positive, default=320)
    parser.add_argument("--num-images", type=positive, default=24_000)
    options = parser.parse_args()
    if options.what == "table":
        return insert_table("paths", markdown(load()))
    options.work_dir = of_this_base(options.work_dir)
    for seed in options.seeds:
        for name in options.cells:
            begin = partial(run_cell, name, seed, options)
            run_once(file_of(name, seed), begin, asked(name, seed, options), cell=name, seed=seed)


if __name__ == "__main__":
    main()
