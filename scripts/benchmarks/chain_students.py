"""What scripts/benchmarks/chain.py makes of an aligned model: exports, banks of pairs, and students, link by link.

All of it lies beside the export of the aligned model, and is made once: whoever comes later waits, and takes it.
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path
from typing import Any

import torch
from alignments import images_in
from cells import align, flowalign, shown
from chain_cells import Bank, Cell, Link, place_of
from pictures import CHUNK, strict_geneval, train

from flowalign.config.sections import ModelConfig
from flowalign.data.banks.latents import LatentBank, Shard, load_bank, save_bank
from flowalign.data.images import ORIGINAL
from flowalign.data.prompts import load_prompts
from flowalign.intake.file import read_yaml
from flowalign.models.build import load_encoders
from flowalign.record.checkpoint import find
from flowalign.record.files import only_one
from flowalign.record.manifest import CheckpointError, manifest_of
from flowalign.record.metrics import read_metrics
from flowalign.samples.scoring import score_images
from rewards.interface import Asked

ENDING = threading.Event()


def go_on() -> None:
    """Begin nothing new once the search is to end: whoever waited for what another cell makes would."""
    if ENDING.is_set():
        raise KeyboardInterrupt


def exported(run: Path, to: Path, threads: int) -> Path:
    """The average of a run's weights as a plain pipeline."""
    if not to.exists():
        go_on()
        flowalign(["export", str(run), "--to", str(to), "--as", "ema"], threads, to.with_suffix(".log"))
    return to


def weights_of(run: Path) -> str:
    """What tells the average of a run from that of another."""
    try:
        return manifest_of(find(run, "ema"))["files"]["ema.safetensors"]["sha256"][:12]
    except (CheckpointError, KeyError) as error:
        raise SystemExit(f"--aligned: {shown(run)} has no average of its weights ({error})") from error


def made_bank(bank: Bank, aligned: Path, seed: int, options: argparse.Namespace) -> Path:
    """Pairs of the aligned model for training prompts, of which a cell may want the right ones alone."""
    whole = aligned.parent / f"pairs-{bank.pairs}-{bank.solver}-{bank.num_steps}-seed{seed}"
    with only_one(whole.with_suffix(".lock")):
        if not (whole / "manifest.json").is_file():
            go_on()
            asked = ["--pairs", str(bank.pairs), "--num-steps", str(bank.num_steps), "--solver", bank.solver]
            arguments = ["make-pairs", str(aligned), "--to", str(whole), *asked, "--seed", str(seed)]
            flowalign(arguments, options.threads, whole.with_suffix(".log"))
        right = whole.with_name(f"{whole.name}-right")
        if bank.right and not (right / "manifest.json").is_file():
            keep_right(whole, right, aligned, options.threads)
    return right if bank.right else whole


@torch.no_grad()
def keep_right(pairs: Path, to: Path, model: Path, threads: int) -> None:
    """Write the bank of those pairs whose picture strictly shows what its training prompt says."""
    torch.set_num_threads(threads)
    encoders, judge = load_encoders(ModelConfig(path=str(model)), text=False), strict_geneval()
    said, bank, shards = {row["prompt"]: row for row in load_prompts("shapes:train")}, load_bank(pairs), []
    for shard in bank.shards:
        prompts = [bank.prompts[row] for row in shard.rows[ORIGINAL].tolist()]
        right = []
        for first in range(0, len(shard), CHUNK):
            images = encoders.decode(shard.latents[first : first + CHUNK].float()).numpy()
            own = prompts[first : first + CHUNK]
            found = score_images(judge, Asked(images, own, [said[prompt] for prompt in own])).scores[judge.name]
            right.append(torch.from_numpy(found >= 1))
        kept = torch.cat(right)
        noise = None if shard.noise is None else shard.noise[kept]
        shards.append(Shard(shard.latents[kept], {ORIGINAL: shard.rows[ORIGINAL][kept]}, noise))
    save_bank(to, LatentBank.of_shards(shards, bank.prompts, encoder=bank.encoder))


def made_student(cell: Cell, aligned: Path, seed: int, options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Walk the links of a cell from the aligned model to its student; what was made before, by any cell, is taken."""
    bank = cell.bank and made_bank(cell.bank, aligned, seed, options)
    model, runs = aligned, []
    for count, link in enumerate(cell.links, 1):
        name = place_of(cell.bank, cell.links[:count], seed)
        with only_one(aligned.parent / f"{name}.lock"):
            run, to = aligned.parent / name, aligned.parent / f"{name}-model"
            if not to.exists():
                go_on()
                keys = link.keys(model, bank, seed)
                if link.command == "align":
                    align(link.config, keys, options.threads, run.parent, name)
                else:
                    train(link.command, link.config, keys, options.threads, run.parent, name)
                exported(run, to, options.threads)
        model, runs = to, [*runs, (link, run)]
    return model, cost_of(bank, runs)


def cost_of(bank: Path | None, runs: list[tuple[Link, Path]]) -> dict[str, Any]:
    """Pairs, latents that were learned from, images that a reward judged, and seconds of training."""
    cost = {"pairs": 0 if bank is None else len(load_bank(bank, verify=False)), "latents": 0, "images": 0, "seconds": 0}
    for link, run in runs:
        rows = read_metrics(run / "metrics.jsonl")
        cost["seconds"] += round(rows[-1]["wall_s"])
        if link.command == "align":
            cost["images"] += sum(map(images_in, rows))
        else:
            cost["latents"] += rows[-1]["iteration"] * read_yaml(run / "config.yaml")["learner"]["batch_size"]
    return cost
