"""Ways of an optimizer's step and of an average's update on a CPU: bits, and seconds of CPU time, of each.

AdamW one tensor after the other (``single``, what torch takes on a CPU), over lists of tensors (``foreach``) and by one
kernel (``fused``); an average that is multiplied and added to tensor by tensor (``single``, what `Average` does), the
same over lists (``foreach``), and moved by ``lerp``. Each way begins at the same weights and takes the same gradients;
one whose weights, moments or average are not ``single``'s to the bit says ``same_bits: false``. ``apart`` is how far it
is from ``single`` as a share of how far that has moved. The networks are the shipped one and an MM-DiT of 24 blocks.
Milliseconds are those of the process, in turn, medians with the least and the most. Prints one JSON object.

    python scripts/benchmarks/updates.py --threads 1 --out scripts/benchmarks/results/updates.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from activations import network
from cells import machine, positive, write
from torch import Tensor

from flowalign.config.sections import SHIPPED, ModelConfig
from flowalign.config.updates import OptimizerConfig
from flowalign.flow.randomness import seeded
from flowalign.models.build import load_network
from flowalign.record.checkpoint import content_hash

DECAY = 0.99
ADAMW: Mapping[str, dict[str, Any]] = {
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def networks(layers: int) -> dict[str, list[Tensor]]:
    """Return the trained weights of each network."""
    shipped = load_network(ModelConfig(path=str(SHIPPED / "pipeline"))).module
    deep = network("none", layers, heads=6, side=16, rank=0, dtype="float32")
    made = {"shipped": shipped, f"{layers} blocks": deep}
    return {name: [p.detach().clone() for p in module.parameters()] for name, module in made.items()}


class Stepped:
    """AdamW in one of the ways, over copies of ``weights``."""

    def __init__(self, weights: Sequence[Tensor], gradients: Sequence[Tensor], options: dict[str, Any]) -> None:
        self.weights = [weight.clone().requires_grad_() for weight in weights]
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient
        self.adamw = torch.optim.AdamW(self.weights, **OptimizerConfig().of_adamw, **options)

    def act(self) -> None:
        self.adamw.step()

    def held(self) -> Sequence[Tensor]:
        return self.weights

    def hash(self) -> str:
        state = self.adamw.state
        held = {f"{i}/{key}": state[w][key] for i, w in enumerate(self.weights) for key in ("exp_avg", "exp_avg_sq")}
        return content_hash({**held, **{str(i): w.detach() for i, w in enumerate(self.weights)}})


def single(average: Sequence[Tensor], weights: Sequence[Tensor]) -> Sequence[Tensor]:
    norms = []
    for own, weight in zip(average, weights, strict=True):
        own.mul_(DECAY).add_(weight, alpha=1 - DECAY)
        norms.append(torch.linalg.vector_norm(own))
    return norms


def foreach(average: list[Tensor], weights: list[Tensor]) -> Sequence[Tensor]:
    torch._foreach_mul_(average, DECAY)
    torch._foreach_add_(average, weights, alpha=1 - DECAY)
    return torch._foreach_norm(average)


def lerp(average: list[Tensor], weights: list[Tensor]) -> Sequence[Tensor]:
    torch._foreach_lerp_(average, weights, 1 - DECAY)
    return torch._foreach_norm(average)


class Averaged:
    """An average in one of the ways, and the norms by which a destroyed one is told."""

    def __init__(self, weights: list[Tensor], moved: list[Tensor], way: Callable[..., Sequence[Tensor]]) -> None:
        self.average, self.moved, self.way = [weight.clone() for weight in weights], moved, way
        self.norms: Sequence[Tensor] = ()

    def act(self) -> None:
        self.norms = self.way(self.average, self.moved)

    def held(self) -> Sequence[Tensor]:
        return self.average

    def hash(self) -> str:
        norms = {f"norm/{i}": norm for i, norm in enumerate(self.norms)}
        return content_hash({**norms, **{str(i): own for i, own in enumerate(self.average)}})


def norm(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return (
        sum(float((a.detach() - b.detach()).double().square().sum()) for a, b in zip(tensors, others, strict=True))
        ** 0.5
    )


def compared(
    ways: Mapping[str, Stepped | Averaged], began: Sequence[Tensor], turns: int, repeats: int
) -> dict[str, Any]:
    """Act in each way in turn, which ``began`` alike; compare what is held after the first turn, and milliseconds."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    same: dict[str, bool] = {}
    apart: dict[str, float] = {}
    for turn in range(turns + 1):
        for name, own in ways.items():
            since = time.process_time()
            for _ in range(repeats):
                own.act()
            if turn:  # the first makes the state
                taken[name].append(1e3 * (time.process_time() - since) / repeats)
        if not turn:
            hashes = {name: own.hash() for name, own in ways.items()}
            same = {name: own == hashes["single"] for name, own in hashes.items()}
            held = ways["single"].held()
            apart = {name: norm(own.held(), held) / norm(began, held) for name, own in ways.items()}
    median = {name: statistics.median(own) for name, own in taken.items()}
    return {
        name: {
            "same_bits": same[name],
            "apart": apart[name],
            "ms": round(median[name], 3),
            "least_and_most": [round(min(own), 3), round(max(own), 3)],
            "faster": round(median["single"] / median[name], 3),
        }
        for name, own in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=positive, default=24, help="of the larger network (24)")
    parser.add_argument("--turns", type=positive, default=9, help="(9)")
    parser.add_argument("--repeats", type=positive, default=5, help="updates of a turn (5)")
    parser.add_argument("--threads", type=positive, default=1, help="(1)")
    parser.add_argument("--out", type=Path, help="a JSON file, beside what is printed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {"machine": machine(options.threads)}
    for name, weights in networks(options.layers).items():
        generator = seeded(0)
        gradients = [1e-3 * torch.randn(weight.shape, generator=generator) for weight in weights]
        moved = [weight + gradient for weight, gradient in zip(weights, gradients, strict=True)]
        with torch.no_grad():
            adamw = {way: Stepped(weights, gradients, own) for way, own in ADAMW.items()}
            averages = {own.__name__: Averaged(weights, moved, own) for own in (single, foreach, lerp)}
            found[name] = {
                "tensors": len(weights),
                "parameters": sum(weight.numel() for weight in weights),
                "adamw": compared(adamw, weights, options.turns, options.repeats),
                "average": compared(averages, weights, options.turns, options.repeats),
            }
    print(json.dumps(found, indent=1))
    if options.out is not None:
        write(options.out, found)


if __name__ == "__main__":
    main()
