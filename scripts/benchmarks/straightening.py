"""What a reflow does to the paths of the shipped model: straightness, quality at few steps, inversion, and its price.

Pairs are made once and shared by all cells; each cell is one loss of the second stage. Before and after are measured
alike: straightness of the model's own Euler paths, FID, CLIP score and strict GenEval at 1, 2, 4 and 8 Euler steps,
Euler against Heun at equal evaluations, and what inversion to the noise and back loses. Writes one JSON file a cell.

    python scripts/benchmarks/straightening.py run --cells "base;reflow"
    python scripts/benchmarks/straightening.py table
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cells import RESULTS, alike, base_digest, flowalign, machine, of_this_base, positive, read, run_once, slug, study
from pages import insert_table
from pictures import CHUNK, Judge, bank, opened, train

from flowalign.config.sections import SHIPPED, SamplingConfig
from flowalign.data.prompts import evaluation_batch
from flowalign.flow import schedule
from flowalign.flow.solvers import ode_solver
from flowalign.flow.straightness import reconstruction_error, straightness
from flowalign.models.base import Policy
from flowalign.models.guided import guided
from flowalign.record.metrics import read_metrics
from flowalign.samples.rollout import SampleNoise

OWN = RESULTS / "straightening"
BASE = SHIPPED / "pipeline"
CELLS: dict[str, dict[str, Any]] = {
    "base": {},
    "reflow": {},
    "reflow, squared, uniform": {"algorithm.loss": "squared", "algorithm.density": "uniform"},
    "reflow, LPIPS-Huber": {"algorithm.loss": "lpips_huber"},
    "reflow, 30 % real data": {"real_data.fraction": 0.3},
}
FEW = (1, 2, 4, 8)
EQUAL = ((3, 2), (7, 4), (15, 8))  # Euler steps, Heun steps: as many evaluations
FINE, WALKED = 100, 128  # steps and samples of the straightness


def measured(policy: Policy, judge: Judge) -> dict[str, Any]:
    scores: dict[str, dict[str, float]] = {}
    for steps in FEW:
        scores[f"euler {steps}"] = judge(policy, SamplingConfig(num_steps=steps, grid="paper"))
    for euler, heun in EQUAL:
        scores[f"euler {euler}"] = judge(policy, SamplingConfig(num_steps=euler, grid="paper"))
        scores[f"heun {heun}"] = judge(policy, SamplingConfig(num_steps=heun, grid="paper", solver="heun"))
    return {"scores": scores, **paths(policy)}


@torch.no_grad()
def paths(policy: Policy) -> dict[str, Any]:
    """Straightness on a fine grid, and reconstruction errors of what it ends in, of unguided velocities."""
    batch, shape = evaluation_batch("shapes:eval", WALKED), policy.network.latent_shape(None, None)
    straight, lost = [], {f"{name} {steps}": [] for name in ("euler", "heun") for steps in (8, 16)}
    for chunk in batch.chunks(CHUNK):
        condition = policy.encoders.encode_prompts(chunk.prompts, 2)

        def velocity(x: torch.Tensor, t: torch.Tensor, condition: Any = condition) -> torch.Tensor:
            return guided(policy.network)(x, t, condition)

        noise = SampleNoise(7, chunk.sample_ids, shape).draw()
        found, x0 = straightness(velocity, noise, schedule.sigmas(FINE, grid="paper"))
        straight += found.tolist()
        for name, solver in (("euler", ode_solver("euler")), ("heun", ode_solver("heun"))):
            for steps in (8, 16):
                sigmas = schedule.sigmas(steps, grid="paper")
                lost[f"{name} {steps}"] += reconstruction_error(velocity, x0, sigmas, solver)[0].tolist()
    return {
        "straightness": statistics.mean(straight),
        "reconstruction_rms": {key: statistics.mean(values) for key, values in lost.items()},
    }


def pairs(options: argparse.Namespace) -> tuple[Path, float]:
    directory, began = options.work_dir / "pairs", time.monotonic()
    if not (directory / "manifest.json").is_file():
        asked = ["--to", str(directory), "--pairs", str(options.pairs), "--num-steps", str(options.pair_steps)]
        arguments = ["make-pairs", str(BASE), *asked, "--solver", "heun"]
        flowalign(arguments, options.threads, options.work_dir / "pairs.log")
    return directory, time.monotonic() - began


def run_cell(name: str, options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    cell: dict[str, Any] = {"machine": machine(options.threads)}
    judge = Judge(options.num_samples)
    if name == "base":
        return cell | measured(opened(BASE, "model")[0], judge)
    made, pairs_s = pairs(options)
    overrides: dict[str, Any] = {"latents": str(made), "phases.0.iterations": options.steps, **CELLS[name]}
    if "real_data.fraction" in overrides:
        overrides["real_data.latents"] = str(bank(options.work_dir / "bank", 24_000, 0, options.threads))
    run = train("pretrain", "reflow", overrides, options.threads, options.work_dir, slug(name))
    row = read_metrics(run / "metrics.jsonl")[-1]
    cost = {
        "pair_evaluations": options.pairs * (2 * options.pair_steps - 1),
        "training_samples": options.steps * 128,
        "pairs_s": round(pairs_s),
        "training_s": round(row["wall_s"]),
        "loss": row["loss"],
    }
    return cell | {"cost": cost} | measured(opened(run, "ema")[0], judge)


def asked(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a cell is, apart from where it ran and what it found."""
    keys = () if name == "base" else ("pairs", "pair_steps", "steps")
    learned = {key: getattr(options, key) for key in keys}
    return {"cell": name, "base": base_digest(), "images": options.num_samples, **learned}


def file_of(name: str) -> Path:
    return OWN / f"{slug(name)}.json"


def markdown() -> str:
    cells = [read(path, "cell", "scores") for name in CELLS if (path := file_of(name)).exists()]
    alike(cells, OWN, "base", "images")
    head = ["model", "straightness", *(f"FID, {n}" for n in FEW), *(f"GenEval, {n}" for n in FEW), "lost, Heun 8"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for cell in cells:
        at = [cell["scores"][f"euler {n}"] for n in FEW]
        row = [cell["cell"], f"{cell['straightness']:.4f}", *(f"{p['fid']:.2f}" for p in at)]
        row += [*(f"{p['geneval']:.3f}" for p in at), f"{cell['reconstruction_rms']['heun 8']:.3f}"]
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", "| evaluations | " + " | ".join(f"{c['cell']}: Euler / Heun" for c in cells) + " |"]
    lines += [f"|{' --- |' * (1 + len(cells))}"]
    for euler, heun in EQUAL:
        row = [f"{c['scores'][f'euler {euler}']['fid']:.2f} / {c['scores'][f'heun {heun}']['fid']:.2f}" for c in cells]
        lines.append(f"| {euler} | {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    parser = study(__doc__, "straightening", CELLS, list(CELLS))
    parser.add_argument("--pairs", type=positive, default=8000)
    parser.add_argument("--pair-steps", type=positive, default=8)
    parser.add_argument("--steps", type=positive, default=800)
    parser.add_argument("--num-samples", type=positive, default=384)
    options = parser.parse_args()
    if options.what == "table":
        return insert_table("straightening", markdown())
    options.work_dir = of_this_base(options.work_dir)
    for name in options.cells:
        run_once(file_of(name), partial(run_cell, name, options), asked(name, options), cell=name)


if __name__ == "__main__":
    main()
