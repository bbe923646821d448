"""How validation loss falls with compute, whether it foretells quality, and which architecture uses compute best.

MM-DiTs of depth d, 64 d wide with d heads, are trained on the same latents with equal batches; at several points of
each run the validation loss (fixed latents, noises and times, averaged weights) stands beside strict GenEval, FID and
CLIP score of the evaluation prompts. Other architectures, of the depth and width whose FLOPs come nearest to the middle
MM-DiT's, are trained alike. Writes a JSON file a cell, a figure and the table of the docs. (arXiv:2403.03206, sec. 5.3
with figure 8, and figure 4)

    python scripts/benchmarks/scaling.py run --cells "mmdit-2;mmdit-3"
    python scripts/benchmarks/scaling.py table
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

import torch
from cells import RESULTS, ROOT, alike, base_digest, machine, of_this_base, positive, read, run_once, study
from pages import insert_table
from pictures import Judge, bank, opened, train

from flowalign.config.sections import SHIPPED, SamplingConfig, TransformerConfig
from flowalign.models.families.sd3.fresh import flops, matching, new_transformer
from flowalign.record import checkpoint
from flowalign.record.metrics import read_metrics

OWN = RESULTS / "scaling"
DEPTHS = (2, 3, 4)
MEASURED = [*(f"mmdit-{depth}" for depth in DEPTHS), "concat", "cross"]  # what a run without --cells trains
CELLS = (*MEASURED, "uvit")
IMAGE_TOKENS, TEXT_TOKENS = 16, 18
TRAINING = 3  # a step costs a forward pass and a backward pass of twice as much
SAMPLING = SamplingConfig(num_steps=25, guidance_scale=3.0)


def spec_of(name: str) -> TransformerConfig:
    like = json.loads((SHIPPED / "pipeline" / "transformer" / "config.json").read_text())
    if name.startswith("mmdit-"):
        return TransformerConfig(num_layers=int(name.removeprefix("mmdit-")))
    middle = TransformerConfig(num_layers=DEPTHS[1])
    return matching(like, middle, name, IMAGE_TOKENS, TEXT_TOKENS)  # type: ignore[arg-type]


def run_cell(name: str, options: argparse.Namespace) -> dict[str, Any]:
    spec = spec_of(name)
    like = json.loads((SHIPPED / "pipeline" / "transformer" / "config.json").read_text())
    network = new_transformer(like, spec)
    forward = flops(network, IMAGE_TOKENS, TEXT_TOKENS)
    every = options.steps // options.points
    overrides: dict[str, Any] = {
        "latents": str(bank(options.work_dir / "bank", options.num_images, 0, options.threads)),
        "validation": {
            "latents": str(bank(options.work_dir / "validation", 2000, 1, options.threads)),
            "every": every,
            "num_samples": 1024,
        },
        "model.transformer": {
            "architecture": spec.architecture,
            "num_layers": spec.num_layers,
            "num_heads": spec.heads,
        },
        "phases.0.iterations": options.steps,
        # A constant rate: each point is then what a shorter run would have reached.
        "phases.0.final_learning_rate": 2.0e-3,
        "checkpoint.every": every,
        "checkpoint.keep_last": options.points,
    }
    run = train("pretrain", "paths", overrides, options.threads, options.work_dir, name)
    losses = {row["iteration"]: row for row in read_metrics(run / "metrics.jsonl") if "validation_ema/loss" in row}
    torch.set_num_threads(options.threads)
    judge, points = Judge(options.num_samples), []
    for step in checkpoint.steps(run / "checkpoints"):
        policy, _ = opened(run / "checkpoints" / f"step_{step:06d}", "ema")
        row = losses[step]
        found = {"step": step, "flops": TRAINING * forward * 128 * step, "validation": row["validation_ema/loss"]}
        points.append({**found, **judge(policy, SAMPLING)})
    return {
        "spec": vars(spec),
        "parameters": sum(p.numel() for p in network.parameters()),
        "forward_flops": forward,
        "machine": machine(options.threads),
        "points": points,
    }


def load() -> list[dict[str, Any]]:
    """The finished cells, all of one base."""
    cells = [read(path, "cell", "points") for name in CELLS if (path := OWN / f"{name}.json").exists()]
    alike(cells, OWN, "base", "images")
    return cells


def asked(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a cell is, apart from where it ran and what it found."""
    counts = {"steps": options.steps, "images": options.num_samples, "bank": options.num_images}
    return {"cell": name, "base": base_digest(), **counts}


def correlations(cells: list[dict[str, Any]]) -> dict[str, float]:
    """Spearman's rank correlation of the validation loss with each score, over all points of the MM-DiTs."""
    from scipy.stats import spearmanr

    points = [point for cell in cells if cell["cell"].startswith("mmdit") for point in cell["points"]]
    loss = [point["validation"] for point in points]
    found: dict[str, Any] = {key: spearmanr(loss, [p[key] for p in points]) for key in ("geneval", "fid", "clip")}
    return {key: float(result.statistic) for key, result in found.items()}


def markdown(cells: list[dict[str, Any]]) -> str:
    lines = ["| network | parameters | FLOPs a sample | training FLOPs | validation loss | GenEval | FID | CLIP |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for cell in cells:
        last = cell["points"][-1]
        lines.append(
            f"| {cell['cell']} ({cell['spec']['num_layers']} layers) | {cell['parameters']:,} "
            f"| {cell['forward_flops'] / 1e6:.0f} M | {last['flops']:.2e} | {last['validation']:.4f} "
            f"| {last['geneval']:.3f} | {last['fid']:.2f} | {last['clip']:.1f} |"
        )
    found = ", ".join(f"{key} {value:+.2f}" for key, value in correlations(cells).items())
    return "\n".join([*lines, "", f"Rank correlation of the validation loss with the scores, MM-DiTs: {found}."])


def draw(cells: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for cell in cells:
        points = cell["points"]
        style = "o-" if cell["cell"].startswith("mmdit") else "s--"
        left.plot([p["flops"] for p in points], [p["validation"] for p in points], style, label=cell["cell"])
        right.plot([p["validation"] for p in points], [p["geneval"] for p in points], style, label=cell["cell"])
    left.set(xscale="log", xlabel="training FLOPs", ylabel="validation loss")
    left.xaxis.set_minor_formatter(NullFormatter())
    left.set_xticks([3e12, 1e13, 3e13], ["3e12", "1e13", "3e13"])
    right.set(xlabel="validation loss", ylabel="strict GenEval")
    right.invert_xaxis()
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / "scaling.png", dpi=110)


def main() -> None:
    parser = study(__doc__, "scaling", CELLS, MEASURED)
    parser.add_argument("--steps", type=positive, default=900)
    parser.add_argument("--points", type=positive, default=3)
    parser.add_argument("--num-samples", type=positive, default=384)
    parser.add_argument("--num-images", type=positive, default=24_000)
    options = parser.parse_args()
    if options.what == "table":
        draw(load())
        return insert_table("scaling", markdown(load()))
    options.work_dir = of_this_base(options.work_dir)
    for name in options.cells:
        run_once(OWN / f"{name}.json", partial(run_cell, name, options), asked(name, options), cell=name)


if __name__ == "__main__":
    main()
