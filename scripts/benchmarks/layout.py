"""How far a prompt's words move the layout that the embedded world's base predicts, and what teaches it.

    python scripts/benchmarks/layout.py                       # the shipped base: one line of JSON, a minute
    python scripts/benchmarks/layout.py --samples 64000 --text oracle --start fresh --times high     # six minutes

Of two prompts that differ in the relation alone ("left of", "right of"), in the order of their objects alone, or in
the order of their colours alone, the true mean pictures differ by m = E[x0 | a] - E[x0 | b], found from renders. A
network's predictions, x - t v(x, t), differ by d from the same noised pictures. Printed is <d, m> / <m, m> over twelve
pairs: 1 where the words do all that they should at t = 1, 0 where they do nothing. (What t < 1 leaves visible of a
picture makes the words matter less there.)

With ``--samples`` the network is trained on renders of ``--tasks`` first, and looked at eight times on the way:

- ``--text shipped`` (the pipeline's encoders), ``oracle`` (one-hot tokens that say every object, colour and relation)
  or ``reading`` (encoders made here as the shipped ones were, in 500 steps);
- ``--start base`` (the shipped network) or ``fresh``;
- ``--times logit_normal`` (as the base of commit d2e20c0 was trained), ``later`` (logit-normal of m = 0.5), ``mode``
  (with heavy tails), ``uniform`` or ``high`` (uniform in [0.8, 1]).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from cells import machine, positive
from torch import Tensor, nn
from torch.nn import functional as F

from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.flow.density import LogitNormal, Mode, Uniform
from flowalign.models.checked import check_pipeline
from flowalign.record.contents import base_hash
from flowalign.shapes.build.autoencoder import to_pixels
from flowalign.shapes.build.pipeline import TEXT_TAIL, load, new_transformer
from flowalign.shapes.build.reading import NOTHING, train_encoders
from flowalign.shapes.prompts import RELATIONS, TASKS, Metadata, Pair, minimal_pairs, prompts, scene
from flowalign.shapes.render import render
from rewards.geneval.detectors.palette import COLORS, SHAPES

ASSETS = Path(__file__).resolve().parents[2] / "flowalign" / "shapes" / "assets" / "pipeline"
KINDS: tuple[Pair, ...] = ("relation", "objects", "colors")
LEVELS = (1.0, 0.95, 0.9, 0.8)
PAIRS, RENDERS, NOISES, SLOTS, BATCH = 12, 48, 16, 16, 64
NAMES = list(COLORS)
Encode = Callable[[Sequence[Metadata]], tuple[Tensor, Tensor]]


def encoder_of(pipeline: Any, text: str) -> Encode:
    """Return what encodes rows to tokens (N, L, D) and pooled vectors (N, D)."""
    if text == "oracle":
        return oracle
    if text == "reading":
        with TemporaryDirectory() as work:
            pipeline.text_encoder, pipeline.text_encoder_2 = train_encoders(Path(work), pipeline.tokenizer, steps=500)

    @cache
    def one(prompt: str) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            tokens, _, pooled, _ = pipeline.encode_prompt(
                [prompt], None, None, do_classifier_free_guidance=False, max_sequence_length=TEXT_TAIL
            )
        return tokens.float(), pooled.float()

    def encode(rows: Sequence[Metadata]) -> tuple[Tensor, Tensor]:
        tokens, pooled = zip(*(one(row["prompt"]) for row in rows), strict=True)
        return torch.cat(tokens), torch.cat(pooled)

    return encode


def oracle(rows: Sequence[Metadata]) -> tuple[Tensor, Tensor]:
    """Return a token an object that says its shape, colour, relation and side by ones, and pooled vectors of zeros."""
    tokens = torch.zeros(len(rows), SLOTS, 320)
    for token, row in zip(tokens, rows, strict=True):
        things = [(side, clause) for side, clause in enumerate(row["include"]) for _ in range(clause["count"])]
        relation = row["include"][-1].get("position") if things else None
        for slot, (side, clause) in zip(token, things, strict=False):
            slot[list(SHAPES).index(clause["class"])] = 6.0
            if "color" in clause:
                slot[20 + NAMES.index(clause["color"])] = 6.0
            if relation:
                slot[60 + 2 * RELATIONS.index(relation[0]) + side] = 6.0
    return tokens, torch.zeros(len(rows), 320)


def velocity(network: nn.Module, x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return network(
            hidden_states=x,
            timestep=1000 * t,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            return_dict=False,
        )[0].float()


@torch.no_grad()
def latents(vae: Any, rows: Sequence[Metadata], rng: np.random.Generator) -> Tensor:
    pixels = to_pixels(np.stack([render(scene(row, rng), rng) for row in rows]))
    with torch.autocast("cpu", torch.bfloat16):
        mean = vae.encode(pixels).latent_dist.mean
    return (mean.float() - vae.config.shift_factor) * vae.config.scaling_factor


@cache
def pairs(kind: Pair) -> tuple[tuple[Metadata, Metadata], ...]:
    """Return pairs of rows that differ in one thing alone, of all prompts, held out or not."""
    every = [*minimal_pairs(kind, "train"), *minimal_pairs(kind, "eval")]
    return tuple(every[i] for i in np.random.default_rng(5).permutation(len(every))[:PAIRS])


@torch.no_grad()
def look(network: nn.Module, vae: Any, encode: Encode) -> dict[str, dict[str, float]]:
    """Return <d, m> / <m, m> of each kind of pair at each level."""
    network.eval()
    found = {}
    for kind in KINDS:
        along, size = dict.fromkeys(LEVELS, 0.0), 0.0
        for number, (a, b) in enumerate(pairs(kind)):
            rng, generator = np.random.default_rng([number, 7]), torch.Generator().manual_seed(number)
            of_a, of_b = (latents(vae, [row] * RENDERS, rng) for row in (a, b))
            m = of_a.mean(0) - of_b.mean(0)
            size += m.square().sum().item()
            pictures = torch.cat([of_a[: NOISES // 2], of_b[: NOISES // 2]])
            tokens, pooled = encode([a, b])
            for t in LEVELS:
                x = (1 - t) * pictures + t * torch.randn(pictures.shape, generator=generator)
                v = [
                    velocity(
                        network,
                        x,
                        torch.full((NOISES,), t),
                        tokens[i].expand(NOISES, -1, -1),
                        pooled[i].expand(NOISES, -1),
                    )
                    for i in range(2)
                ]
                along[t] += (t * (v[1] - v[0]).mean(0) * m).sum().item()
        found[kind] = {str(t): round(value / size, 3) for t, value in along.items()}
    return found


def scheduled(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 100) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)


def say(stage: str, **what: Any) -> None:
    print(json.dumps({"stage": stage, **what}), flush=True)


TIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "logit_normal": LogitNormal().from_uniform,
    "later": LogitNormal(0.5).from_uniform,
    "mode": Mode().from_uniform,
    "uniform": Uniform().from_uniform,
    "high": lambda u: 0.8 + 0.2 * u,
}


def learn(network: nn.Module, vae: Any, encode: Encode, arguments: argparse.Namespace) -> None:
    """Train by flow matching on a bank of renders, with a tenth of the prompts dropped, and look eight times."""
    rng, batch, steps = np.random.default_rng(1), BATCH, arguments.samples // BATCH
    tasks = arguments.tasks.split(",")
    rows, bank = [], []
    for _ in range(math.ceil(min(arguments.samples, 24_000) / 250)):
        chosen = [prompts("train", tasks[int(rng.integers(len(tasks)))]) for _ in range(250)]
        drawn_rows = [pool[int(rng.integers(len(pool)))] for pool in chosen]
        bank.append(latents(vae, drawn_rows, rng).half())
        rows += drawn_rows
    stored = torch.cat(bank)
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    began, losses = time.monotonic(), []
    for step in range(steps):
        network.train()
        optimizer.param_groups[0]["lr"] = arguments.learning_rate * scheduled(step, steps)
        index = rng.integers(len(rows), size=batch)
        x0 = stored[torch.from_numpy(index)].float()
        tokens, pooled = encode([rows[i] if rng.random() >= 0.1 else NOTHING for i in index])
        t, noise = TIMES[arguments.times](torch.rand(batch)), torch.randn(x0.shape)
        level = t[:, None, None, None]
        v = velocity(network, (1 - level) * x0 + level * noise, t, tokens, pooled)
        loss = F.mse_loss(v, noise - x0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % max(1, steps // 8) == 0:
            mean = sum(losses) / len(losses)
            seconds = round(time.monotonic() - began)
            say(
                "learnt", samples=(step + 1) * batch, loss=round(mean, 4), seconds=seconds, **look(network, vae, encode)
            )
            losses = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=ASSETS)
    parser.add_argument("--samples", type=int, default=0)
    parser.add_argument("--text", choices=("shipped", "oracle", "reading"), default="shipped")
    parser.add_argument("--start", choices=("base", "fresh"), default="base")
    parser.add_argument("--times", choices=list(TIMES), default="logit_normal")
    parser.add_argument("--tasks", default="position")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=positive, default=1)
    arguments = parser.parse_args()
    if arguments.samples < 0 or 0 < arguments.samples < BATCH:
        parser.error(f"--samples: {arguments.samples} makes no batch of {BATCH}; 0 trains nothing")
    if unknown := sorted(set(arguments.tasks.split(",")) - set(TASKS)):
        parser.error(f"--tasks: no task {unknown[0]!r}; there are {', '.join(TASKS)}")
    torch.set_num_threads(arguments.threads)
    try:
        check_pipeline("--pipeline", arguments.pipeline, ModelConfig(path=str(arguments.pipeline)))
    except ConfigError as error:
        parser.error(str(error))
    pipeline = load(arguments.pipeline)
    network, vae = pipeline.transformer, pipeline.vae.eval()
    if arguments.start == "fresh":
        torch.manual_seed(0)
        network = new_transformer(320, 320)
    say(
        "asked",
        **{k: str(v) for k, v in vars(arguments).items() if k != "pipeline"},
        base=base_hash(arguments.pipeline)[:12],
        machine=machine(arguments.threads),
    )
    encode = encoder_of(pipeline, arguments.text)
    say("before", **look(network, vae, encode))
    if arguments.samples:
        learn(network, vae, encode, arguments)


if __name__ == "__main__":
    main()
