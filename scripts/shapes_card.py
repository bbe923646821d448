"""Measures the shipped networks of the embedded world and writes their card and checksums.

    python scripts/shapes_card.py --samples 600 --machine "2 cores, AVX-512, AMX"

Four ways to sample the pipeline: the run's own (10 ODE steps, no guidance, text tail 2), the same with a tail of 256,
guidance 3, and the plain diffusers call ``pipe(prompt)`` with all its defaults.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flowalign.shapes
from flowalign.config.sections import ModelConfig
from flowalign.data.prompts import evaluation_batch
from flowalign.models.base import Policy
from flowalign.models.build import load_policy
from flowalign.models.loading import assembled
from flowalign.samples.opened import ode_plan
from flowalign.samples.rollout import rollout
from flowalign.shapes.prompts import TASKS
from rewards.geneval.detectors.palette import PaletteDetector
from rewards.geneval.judge import judge

ROOT = Path(__file__).resolve().parents[1]
ASSETS = Path(flowalign.shapes.__path__[0]) / "assets"
KINDS = (".json", ".md", ".safetensors")
SEED = 1234


def verdicts(images: np.ndarray, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Official and strict means by task, and over tasks."""
    found = PaletteDetector().detect(images, rows)
    judged = [judge(row, objects) for row, objects in zip(rows, found, strict=True)]
    table = {}
    for mode, field in (("official", "correct"), ("strict", "strict")):
        by_task = {
            task: float(np.mean([getattr(v, field) for v, row in zip(judged, rows, strict=True) if row["tag"] == task]))
            for task in TASKS
        }
        table[mode] = {"overall": float(np.mean(list(by_task.values()))), **by_task}
    return table


def sampled(policy: Policy, count: int, *, tail: int, guidance: float) -> dict[str, dict[str, float]]:
    batch, plan = evaluation_batch("shapes:eval", count), ode_plan(policy, 10, guidance)
    parts = [
        rollout(policy, part, plan, seed=SEED, policy_version=0, length=tail).pictures.images.numpy()
        for part in batch.chunks(48)
    ]
    return verdicts(np.concatenate(parts), [dict(row) for row in batch.metadata])


def plain(policy: Policy, count: int) -> dict[str, dict[str, float]]:
    batch = evaluation_batch("shapes:eval", count)
    pipeline = assembled(policy)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    parts = [pipeline(list(part.prompts), output_type="np", generator=generator).images for part in batch.chunks(24)]
    images = np.rint(np.concatenate(parts) * 255).astype(np.uint8)
    return verdicts(images, [dict(row) for row in batch.metadata])


def words(told: dict[str, Any]) -> str:
    """Write the tables of what ``scripts/benchmarks/words.py`` found."""
    lines = ["| | " + " | ".join(TASKS) + " |", "| --- " * (len(TASKS) + 1) + "|"]
    for key, name in (("official", "official"), ("strict", "strict"), ("learnable", "prompts with a right picture")):
        lines.append(f"| {name} | " + " | ".join(f"{told['tasks'][task][key]:.3f}" for task in TASKS) + " |")
    position = told["tasks"]["position"]
    known = {name: share for name, share in position["by_relation"].items() if share is not None}
    if not known:
        raise SystemExit("words.json: no picture shows both objects; let words.py draw more --prompts")
    by_relation = ", ".join(f"{name} {share:.2f}" for name, share in known.items())
    lines += [
        "",
        f"Where both objects are there, the relation is right in {position['relation_given_both']:.3f}: {by_relation}.",
    ]
    kinds = list(told["encoders"])
    lines += ["", "| what changes in a prompt | " + " | ".join(kinds) + " |", "| --- " * (len(kinds) + 1) + "|"]
    for key, name in (
        ("tokens_told", "both of a pair read right from the tokens"),
        ("pooled_told", "the same from the pooled vector"),
        ("tokens_share", "share of the tokens' variance"),
        ("pooled_share", "share of the pooled vector's variance"),
    ):
        lines.append(f"| {name} | " + " | ".join(f"{told['encoders'][kind][key]:.4f}" for kind in kinds) + " |")
    lines.append("| change of the picture | " + " | ".join(f"{told['swaps'][kind]:.4f}" for kind in kinds) + " |")
    whole = ", ".join(
        f"{told['swaps'][f'prompt of {task}']:.3f} ({task})" for task in ("position", "color_attr", "counting")
    )
    return "\n".join([*lines, "", f"Another prompt of the same task changes a picture by {whole}."])


def shipped() -> list[Path]:
    """Every shipped file but the list of checksums; one of another kind, such as an editor's, ends the command."""
    files = sorted(p for p in ASSETS.rglob("*") if p.is_file() and p.name != "SHA256SUMS")
    if strays := [p for p in files if p.suffix not in KINDS or p.name.startswith(".")]:
        raise SystemExit(f"{strays[0]} is none of the files that ship; move it away")
    return files


def checksums(files: Sequence[Path]) -> str:
    """The lines that ``sha256sum`` prints of ``files``."""
    return "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(ASSETS)}\n" for p in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--plain-samples", type=int, default=180)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--machine", default="2 CPU cores")
    options = parser.parse_args()
    if min(options.samples, options.plain_samples) < len(TASKS):
        parser.error(f"--samples and --plain-samples: {len(TASKS)} tasks take turns, and each needs a sample")
    files = {*shipped(), ASSETS / "README.md"}
    torch.set_num_threads(options.threads)
    policy = load_policy(ModelConfig(path=str(ASSETS / "pipeline")))
    rows = {
        f"10 ODE steps, no guidance, text tail 2 ({options.samples} samples)": sampled(
            policy, options.samples, tail=2, guidance=1.0
        ),
        f"the same, text tail 256 ({options.samples} samples)": sampled(
            policy, options.samples, tail=256, guidance=1.0
        ),
        f"10 ODE steps, guidance 3, text tail 2 ({options.samples} samples)": sampled(
            policy, options.samples, tail=2, guidance=3.0
        ),
        f"plain `pipe(prompt)`: 28 steps, guidance 7, text tail 256 ({options.plain_samples} samples)": plain(
            policy, options.plain_samples
        ),
    }
    columns = ["overall", *TASKS]
    lines = ["| sampling | mode | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 2) + "|"]
    for name, table in rows.items():
        for mode, scores in table.items():
            lines.append(f"| {name} | {mode} | " + " | ".join(f"{scores[c]:.3f}" for c in columns) + " |")
    template = (Path(__file__).parent / "shapes_card.md").read_text()
    told = json.loads((ROOT / "scripts" / "benchmarks" / "results" / "words.json").read_text())
    card = template.replace("{{scores}}", "\n".join(lines)).replace("{{machine}}", options.machine)
    card = card.replace("{{words}}", words(told))
    (ASSETS / "README.md").write_text(card)
    (ASSETS / "SHA256SUMS").write_text(checksums(sorted(files)))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
