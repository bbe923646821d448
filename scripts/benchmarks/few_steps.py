"""Few-step students of the shipped model against the model itself: quality at 1, 2, 4 and 50 steps.

Students: MeanFlow (no teacher), consistency distillation, progressive distillation (three rounds: 16, 8 and 4 steps)
and guidance distillation (a guided teacher's quality for half of its evaluations). All start from the base and see the
same latents. Writes one JSON file a model and its images of the same noises, from which ``table`` makes those of the
docs.

    python scripts/benchmarks/few_steps.py run --cells "base;meanflow"
    python scripts/benchmarks/few_steps.py table
"""

from __future__ import annotations

import argparse
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import (
    RESULTS,
    ROOT,
    alike,
    base_digest,
    flowalign,
    machine,
    of_this_base,
    positive,
    read,
    run_once,
    slug,
    study,
)
from pages import insert_table
from pictures import Judge, bank, opened, train
from PIL import Image

from flowalign.config.sections import SHIPPED, SamplingConfig
from flowalign.data.prompts import evaluation_batch
from flowalign.record.metrics import read_metrics

OWN, SHEETS = RESULTS / "few_steps", ROOT / "docs" / "figures"
BASE = SHIPPED / "pipeline"
COLUMNS = 8
# A model's own steps first; "guided" models are judged at the guidance that they were taught.
SAMPLED: dict[str, list[SamplingConfig]] = {
    "base": [SamplingConfig(num_steps=n, grid="paper") for n in (1, 2, 4, 8, 50)],
    "base, guidance 3": [SamplingConfig(num_steps=n, grid="paper", guidance_scale=3) for n in (4, 50)],
    "meanflow": [SamplingConfig(num_steps=n, grid="paper") for n in (1, 2, 4)],
    "consistency": [SamplingConfig(num_steps=n, grid="paper", solver="consistency") for n in (1, 2, 4)],
    "progressive": [SamplingConfig(num_steps=n, grid="paper") for n in (4, 2, 1)],
    "guidance": [SamplingConfig(num_steps=n, grid="paper") for n in (4, 50)],
}


def trained(name: str, options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The run of a student, or the base itself, and what it cost."""
    if name.startswith("base"):
        return BASE, {}
    latents = str(bank(options.work_dir / "bank", 24_000, 0, options.threads))
    common = {"latents": latents, "phases.0.iterations": options.steps}
    if name != "progressive":
        command = "pretrain" if name == "meanflow" else "distill"
        config = "guidance_distill" if name == "guidance" else name
        run = train(command, config, common, options.threads, options.work_dir, name)
        return run, _cost(run)
    start, cost = str(BASE), {"training_s": 0, "training_samples": 0}
    for steps in (16, 8, 4):
        own = {**common, "phases.0.iterations": options.steps // 2, "algorithm.num_steps": steps}
        own |= {"model.path": start, "teacher.path": start, "evaluation.num_steps": steps}
        run = train("distill", "progressive", own, options.threads, options.work_dir, f"progressive-{steps}")
        cost = {key: cost[key] + value for key, value in _cost(run).items()}
        start = str(options.work_dir / f"progressive-{steps}-model")
        if not Path(start).exists():
            flowalign(["export", str(run), "--to", start, "--as", "ema"], options.threads, run.with_suffix(".log"))
    return run, cost


def _cost(run: Path) -> dict[str, Any]:
    row = read_metrics(run / "metrics.jsonl")[-1]
    return {"training_s": round(row["wall_s"]), "training_samples": row["iteration"] * 128}


def run_cell(name: str, options: argparse.Namespace) -> dict[str, Any]:
    source, cost = trained(name, options)
    torch.set_num_threads(options.threads)
    judge = Judge(options.num_samples)
    policy, _ = opened(source, "model" if source == BASE else "ema")
    scores = {}
    for sampling in SAMPLED[name]:
        made = judge.draw(policy, sampling)
        scores[str(sampling.num_steps)] = judge.score(made)
        sheet = sheet_of(name, str(sampling.num_steps))
        sheet.parent.mkdir(parents=True, exist_ok=True)
        first = made[0].pictures.images[:COLUMNS].numpy()
        Image.fromarray(np.concatenate(list(first), 1)).save(sheet)
    return {"machine": machine(options.threads), "cost": cost, "scores": scores}


def asked(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a cell is, apart from where it ran and what it found."""
    steps = {} if name.startswith("base") else {"steps": options.steps}
    return {"cell": name, "base": base_digest(), "images": options.num_samples, **steps}


def sheet_of(name: str, steps: str) -> Path:
    """A model's first images with so many steps, side by side; lies beside its scores."""
    return OWN / "sheets" / f"{file_of(name).stem}-{steps}.png"


def load() -> list[dict[str, Any]]:
    """The finished cells, all of one base."""
    cells = [read(path, "cell", "scores") for name in SAMPLED if (path := file_of(name)).exists()]
    alike(cells, OWN, "base", "images")
    return cells


def file_of(name: str) -> Path:
    return OWN / f"{slug(name)}.json"


def markdown() -> str:
    steps = (1, 2, 4, 8, 50)
    head = ["model", *(f"{n} step{'s' if n > 1 else ''}: FID / GenEval" for n in steps), "training images", "minutes"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for cell in load():
        row = [cell["cell"]]
        for n in steps:
            found = cell["scores"].get(str(n))
            row.append("–" if found is None else f"{found['fid']:.2f} / {found['geneval']:.3f}")
        cost = cell["cost"]
        row += [f"{cost['training_samples']:,}", f"{cost['training_s'] / 60:.0f}"] if cost else ["–", "–"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def sheet() -> None:
    """One row a model and step count, the same eight noises and prompts in each."""
    rows = [(cell["cell"], n) for cell in load() for n in cell["scores"]]
    files = [sheet_of(name, n) for name, n in rows]
    lacking = sorted({name for (name, _), file in zip(rows, files, strict=True) if not file.is_file()})
    if lacking:
        print(f"the figure stays as it is: no pictures of {', '.join(lacking)}; delete their JSON and `run`")
        return
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 1.15 * len(rows)), gridspec_kw={"hspace": 0.05})
    for axis, (name, n), file in zip(axes, rows, files, strict=True):
        axis.imshow(np.asarray(Image.open(file)))
        label = f"{name}\n{n} step{'' if n == '1' else 's'}"
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    prompts = evaluation_batch("shapes:eval", COLUMNS).prompts
    width = Image.open(files[0]).width / COLUMNS
    said = [textwrap.fill(prompt.removeprefix("a photo of "), 14) for prompt in prompts]
    axes[0].set_xticks([(i + 0.5) * width for i in range(COLUMNS)], said, fontsize=7)
    axes[0].tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    figure.savefig(SHEETS / "few_steps.png", dpi=90, bbox_inches="tight", pad_inches=0.05)


def main() -> None:
    parser = study(__doc__, "few_steps", SAMPLED, list(SAMPLED))
    parser.add_argument("--steps", type=positive, default=600)
    parser.add_argument("--num-samples", type=positive, default=384)
    options = parser.parse_args()
    if options.what == "table":
        sheet()
        return insert_table("few_steps", markdown())
    options.work_dir = of_this_base(options.work_dir)
    for name in options.cells:
        run_once(file_of(name), partial(run_cell, name, options), asked(name, options), cell=name)


if __name__ == "__main__":
    main()
