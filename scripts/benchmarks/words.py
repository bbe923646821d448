"""What the words of a prompt do in the embedded world: in its encoders, in its pictures, and what is left to learn.

    python scripts/benchmarks/words.py                              # the shipped base, five minutes on one core
    python scripts/benchmarks/words.py --pipeline DIR --to FILE     # another one
    python scripts/benchmarks/words.py --sheet docs/figures/base.png   # twelve pictures of each task, and no figures

Printed is one JSON object.

- ``encoders``: of minimal pairs (two prompts that differ in the relation, in the order of their objects, in the order
  of their colours or in the number alone) the share of which a reader tells both right. The reader sees what the
  network sees, frozen, and is trained here on training prompts; the pairs begin at held-out ones. ``share`` is the
  part of the variance of all prompts of that task that the one word makes up: the variance within a pair over it.
- ``swaps``: by how much pictures of the same noise differ (mean absolute difference, of 1) when a word changes;
  ``prompt`` is another prompt of the same task.
- ``tasks``: of held-out prompts with ``--group`` pictures each (10 ODE steps, no guidance, the length of the zero text
  that runs use): official and strict share, ``learnable`` the share of prompts with a strictly right picture among
  them, and of relations the share that is right (officially) where both objects are there.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import machine, positive, write
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F

from flowalign.config.section import ConfigError
from flowalign.config.sections import SHIPPED, ModelConfig
from flowalign.data.prompts import evaluation_batch
from flowalign.models.base import Policy
from flowalign.models.build import load_policy
from flowalign.models.checked import check_pipeline
from flowalign.models.errors import ModelError
from flowalign.samples.opened import ode_plan
from flowalign.samples.rollout import rollout
from flowalign.shapes.build.pipeline import TEXT_TAIL
from flowalign.shapes.build.reading import Reader, answers
from flowalign.shapes.prompts import PAIRS, RELATIONS, TASKS, Metadata, minimal_pairs, prompts
from flowalign.types import PromptBatch
from rewards.geneval.detectors.palette import PaletteDetector
from rewards.geneval.judge import judge

SEED, STEPS = 1234, 10
TEXTS = ("tokens", "pooled")


@torch.no_grad()
def encoded(policy: Policy, rows: Sequence[Metadata]) -> tuple[Tensor, Tensor]:
    """Return the tokens (N, L, D) and pooled vectors (N, P) that the network is given."""
    texts = [policy.encoders.encode_text(row["prompt"], TEXT_TAIL) for row in rows]
    tokens, pooled = (torch.cat([text[name].float() for text in texts]) for name in TEXTS)
    return tokens, pooled


def trained_reader(policy: Policy, steps: int) -> nn.Module:
    torch.manual_seed(0)
    rows = prompts("train")
    (tokens, pooled), told = encoded(policy, rows), answers(rows)
    of_task = {task: [i for i, row in enumerate(rows) if row["tag"] == task] for task in TASKS}
    reader = Reader(tokens.shape[-1], pooled.shape[-1])
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        index = [int(rng.choice(of_task[task])) for task in rng.choice(TASKS, 128)]
        read = reader(tokens[index], pooled[index])
        losses = [F.cross_entropy(g, f) for answer in read for g, f in zip(answer, told[:, index], strict=True)]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
        schedule.step()
    return reader.eval().requires_grad_(False)


def of_encoders(policy: Policy, steps: int) -> dict[str, dict[str, float]]:
    reader, found = trained_reader(policy, steps), {}
    for kind in PAIRS:
        pairs = minimal_pairs(kind, "eval")
        told, vectors = [], []
        for rows in zip(*pairs, strict=True):
            seen = encoded(policy, rows)
            vectors.append(seen)
            told.append(
                [
                    torch.stack([g.argmax(1) == f for g, f in zip(answer, answers(rows), strict=True)]).all(0)
                    for answer in reader(*seen)
                ]
            )
        right = {name: (a & b).float().mean().item() for name, a, b in zip(TEXTS, *told, strict=True)}
        share = {
            name: ((a - b).square().sum() / 4 / (a - a.mean(0)).square().sum()).item()
            for name, a, b in zip(TEXTS, *vectors, strict=True)
        }
        found[kind] = {
            "pairs": len(pairs),
            **{f"{name}_told": round(value, 4) for name, value in right.items()},
            **{f"{name}_share": round(value, 4) for name, value in share.items()},
        }
    return found


def drawn(policy: Policy, rows: Sequence[Metadata], sample_ids: Sequence[int], seed: int = SEED) -> np.ndarray:
    """Return the pictures of rows, uint8 (N, H, W, 3), each from the noise of its sample id."""
    batch = PromptBatch(
        prompts=tuple(row["prompt"] for row in rows),
        metadata=tuple(rows),
        sample_ids=tuple(sample_ids),
        group_ids=tuple(sample_ids),
    )
    plan = ode_plan(policy, STEPS, 1.0)
    return np.concatenate(
        [
            rollout(policy, part, plan, seed=seed, policy_version=0, length=TEXT_TAIL).pictures.images.numpy()
            for part in batch.chunks(96)
        ]
    )


def of_swaps(policy: Policy, count: int) -> dict[str, float]:
    found, rng = {}, np.random.default_rng(11)

    def differ(pairs: Sequence[tuple[Metadata, Metadata]]) -> float:
        chosen = [pairs[int(i)] for i in rng.choice(len(pairs), count, replace=len(pairs) < count)]
        first, second = (drawn(policy, rows, range(count)).astype(np.float32) for rows in zip(*chosen, strict=True))
        return round(float(np.abs(first - second).mean() / 255), 4)

    for kind in PAIRS:
        found[kind] = differ(minimal_pairs(kind, "eval"))
    for task in ("position", "color_attr", "counting"):
        rows = prompts("eval", task)
        found[f"prompt of {task}"] = differ(list(zip(rows, np.roll(np.array(rows, dtype=object), 7), strict=True)))
    return found


def share(right: np.ndarray) -> float | None:
    """The mean of what is right; None of nothing, as where no picture shows both objects."""
    return round(float(right.mean()), 4) if len(right) else None


def of_tasks(policy: Policy, count: int, group: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    batch = evaluation_batch("shapes:eval", count * len(TASKS))
    for task in TASKS:
        own = [dict(row) for row in batch.metadata if row["tag"] == task]
        rows = [row for row in own for _ in range(group)]
        objects = PaletteDetector().detect(drawn(policy, rows, range(len(rows))), rows)
        verdicts = [judge(row, seen) for row, seen in zip(rows, objects, strict=True)]
        strict = np.array([v.strict for v in verdicts])
        found[task] = {
            "official": round(float(np.mean([v.correct for v in verdicts])), 4),
            "strict": round(float(strict.mean()), 4),
            "learnable": round(float(strict.reshape(-1, group).any(1).mean()), 4),
        }
        if task == "position":
            both = [
                all(seen.get(clause["class"]) for clause in row["include"])
                for row, seen in zip(rows, objects, strict=True)
            ]
            right = np.array([v.correct for v in verdicts])[both]
            said = np.array([row["include"][-1]["position"][0] for row in rows])[both]
            found[task] |= {
                "both_there": round(float(np.mean(both)), 4),
                "relation_given_both": share(right),
                "by_relation": {name: share(right[said == name]) for name in RELATIONS},
            }
    return found


def sheet(policy: Policy, path: Path, count: int = 12, side: int = 96) -> None:
    """Draw ``count`` pictures of each task in a row, each above its prompt, as the evaluation draws its first ones."""
    rows = [dict(row) for row in evaluation_batch("shapes:eval", count * len(TASKS)).metadata]
    pictures = drawn(policy, rows, range(len(rows)))
    page = Image.new("RGB", (count * (side + 6), len(TASKS) * (side + 48)), "white")
    pen = ImageDraw.Draw(page)
    for number, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
        column, line = divmod(number, len(TASKS))  # an evaluation takes tasks in turn
        x, y = column * (side + 6), line * (side + 48)
        page.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (x, y))
        pen.text((x, y + side), textwrap.fill(row["prompt"].removeprefix("a photo of "), 17), fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=SHIPPED / "pipeline")
    parser.add_argument("--to", type=Path)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--prompts", type=positive, default=24, help="held-out prompts of each task")
    parser.add_argument("--group", type=positive, default=24)
    parser.add_argument("--pairs", type=positive, default=96)
    parser.add_argument("--reader-steps", type=positive, default=600)
    parser.add_argument("--threads", type=positive, default=1)
    options = parser.parse_args()
    if options.sheet and options.to:
        parser.error("--sheet: draws pictures and finds no figures; leave --to out")
    if options.sheet and options.sheet.suffix.lower() not in Image.registered_extensions():
        parser.error(f"--sheet: {options.sheet} names no kind of picture; end it in .png")
    torch.set_num_threads(options.threads)
    model = ModelConfig(path=str(options.pipeline), dtype="bfloat16")
    try:
        check_pipeline("--pipeline", options.pipeline, model)
        policy = load_policy(model)
    except (ConfigError, ModelError) as error:
        parser.error(str(error))
    if options.sheet:
        sheet(policy, options.sheet)
        return
    found = {
        "machine": machine(options.threads),
        "encoders": of_encoders(policy, options.reader_steps),
        "swaps": of_swaps(policy, options.pairs),
        "tasks": of_tasks(policy, options.prompts, options.group),
    }
    print(json.dumps(found))
    if options.to:
        write(options.to, found)


if __name__ == "__main__":
    main()
