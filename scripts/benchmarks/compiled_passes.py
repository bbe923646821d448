"""What torch.compile makes of the shipped network's passes: how far its graphs are apart, and how fast each is.

``plain`` is not compiled. ``forgets`` is compiled as a whole and asked without gradients, by the graph that torch makes
for that; ``whole`` by the graph that learns; ``blocks`` is compiled block by block, as an alignment is, by the graph
that learns. Prints one JSON object: seconds of the first forward and backward pass, the largest differences of the
velocities, and milliseconds of a pass in turn, medians with the least and the most. Nothing else may run beside it.

    python scripts/benchmarks/compiled_passes.py --threads 1 --out scripts/benchmarks/results/compiled_passes.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cells import machine, positive, write
from torch import Tensor

from flowalign.config.sections import SHIPPED, ModelConfig
from flowalign.models.build import load_encoders, load_network
from flowalign.models.network import Network
from flowalign.types import Condition

PROMPTS = ["a photo of a red circle", "a photo of a star left of a blue square"]
MODEL = ModelConfig(path=str(SHIPPED / "pipeline"), dtype="bfloat16", max_sequence_length=2)


class Passes:
    """Passes of one batch of ``size`` samples through the network, compiled in one of the ways."""

    def __init__(self, how: str, size: int, condition: Condition) -> None:
        self.network: Network = load_network(MODEL)
        if how == "blocks":
            self.network.compile()
        elif how != "plain":
            self.network.module.compile(dynamic=False)
            self.network.compiled = how == "whole"
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(size, *self.network.latent_shape(), generator=generator)
        self.t, self.condition = torch.full((size,), 0.6), condition

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self.network.velocity(self.x, self.t, self.condition)

    def learn(self) -> Tensor:
        velocity = self.network.velocity(self.x, self.t, self.condition)
        velocity.square().mean().backward()
        for parameter in self.network.module.parameters():
            parameter.grad = None
        return velocity.detach()


def seconds(act: Callable[[], Any], count: int = 1) -> float:
    began = time.perf_counter()
    for _ in range(count):
        act()
    return (time.perf_counter() - began) / count


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def first_passes(ways: dict[str, Passes], folder: Path) -> dict[str, dict[str, float]]:
    """Seconds of the first passes of each way, with an empty cache of the compiler each."""
    found = {}
    for how, own in ways.items():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / how)
        found[how] = {"forward": seconds(own.forward)}
        if how != "forgets":
            found[how]["learn"] = seconds(own.learn)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=positive, default=96, help="samples of a pass (96)")
    parser.add_argument("--turns", type=positive, default=5, help="(5)")
    parser.add_argument("--repeats", type=positive, default=5, help="passes of a turn (5)")
    parser.add_argument("--threads", type=positive, default=1, help="(1)")
    parser.add_argument("--out", type=Path, help="a JSON file, beside what is printed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    index = torch.arange(options.size) % len(PROMPTS)
    condition = load_encoders(MODEL).encode_prompts(PROMPTS, MODEL.max_sequence_length).take(index)
    ways = {how: Passes(how, options.size, condition) for how in ("plain", "forgets", "whole", "blocks")}
    folder = Path(tempfile.mkdtemp(prefix="compiled-"))
    try:
        first = first_passes(ways, folder)
    finally:
        shutil.rmtree(folder)
    made = {how: own.forward() for how, own in ways.items()}
    apart = {how: largest(made["plain"], made[how]) for how in ("forgets", "whole", "blocks")}
    apart |= {
        "without gradients: the graph that learns": largest(made["whole"], ways["whole"].learn()),
        "without gradients: a graph of its own": largest(made["forgets"], ways["whole"].learn()),
        "largest velocity": float(made["plain"].abs().max()),
    }
    turns: dict[str, list[float]] = {}
    for _ in range(options.turns):
        for how, own in ways.items():
            acts = {"forward": own.forward} | ({} if how == "forgets" else {"learn": own.learn})
            for name, act in acts.items():
                turns.setdefault(f"{how} {name}", []).append(1e3 * seconds(act, options.repeats))
    told = {name: {"median": statistics.median(t), "from": min(t), "to": max(t)} for name, t in turns.items()}
    found = {"machine": machine(options.threads), "size": options.size, "first_s": first, "apart": apart, "ms": told}
    print(json.dumps(found, indent=1))
    if options.out is not None:
        write(options.out, found)


if __name__ == "__main__":
    main()
