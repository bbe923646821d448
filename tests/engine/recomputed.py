"""One rank that learns with activations kept, and computed anew.

``python -m tests.engine.recomputed DIR RANK WORLD PORT KINDS``, KINDS as in f0123: FSDP2 and ZeRO stages. What it
learns is a real, tiny MM-DiT, whole and by a LoRA.

Writes, of each engine and each way, the losses of three updates and the hashes of weights and optimizer's state.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flowalign.engine.zero
from flowalign.algorithm import LossOutput
from flowalign.engine.build import build_engine
from flowalign.flow.randomness import seeded
from flowalign.models.activation_checkpointing import checkpoint_activations
from flowalign.record.checkpoint import content_hash
from flowalign.shapes.build.pipeline import new_transformer
from flowalign.types import TrainBatch
from tests.conditions import text_condition
from tests.engine.toy import settings

NETWORKS = {"whole": "float32", "lora": "bfloat16"}


def ways_of(kind: str) -> tuple[str, ...]:
    return ("none", "blocks") if kind == "3" else ("none", "blocks", "selective")


def transformer(lora: bool) -> nn.Module:
    """An MM-DiT of two blocks, none of its layers zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: Any = new_transformer(16, 16, num_layers=2, num_heads=1)
        if lora:
            from peft import LoraConfig

            network.requires_grad_(False)
            targets = ["attn.to_q", "attn.to_out.0", "attn.add_v_proj", "ff.net.2"]
            network.add_adapter(LoraConfig(r=2, target_modules=targets))
        for parameter in network.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.05)
    return network


def loss_of(network: nn.Module) -> Callable[[TrainBatch], LossOutput]:
    def velocity(x: Tensor, text: dict[str, Tensor]) -> Tensor:
        return network(
            hidden_states=x,
            timestep=torch.linspace(100, 900, len(x)),
            encoder_hidden_states=text["tokens"],
            pooled_projections=text["pooled"],
            return_dict=False,
        )[0]

    def loss(minibatch: TrainBatch) -> LossOutput:
        x, text = minibatch.tensors["x"], minibatch.condition.expand()
        first = velocity(x, text)
        with torch.no_grad():  # as a reference is asked, between a pass and its backward
            frozen = velocity(0.5 * x, text)
        made = first + 2 * velocity(-x, text) - frozen
        return LossOutput((made - minibatch.tensors["y"]).float().square().mean())

    return loss


def batch(step: int, rank: int) -> TrainBatch:
    generator = seeded(3, step, rank)
    x, y = (torch.randn(4, 16, 8, 8, generator=generator) for _ in range(2))
    tokens, pooled = torch.randn(4, 5, 16, generator=generator), torch.randn(4, 16, generator=generator)
    return TrainBatch({"x": x, "y": y}, text_condition(tokens, pooled, torch.arange(4), tokens[:1], pooled[:1]), {})


def learned(kind: str, way: str, name: str, place: dict[str, Any]) -> dict[str, Any]:
    network = transformer(name == "lora")
    checkpoint_activations(network, way)
    own = {"type": "fsdp"} if kind == "f" else {"zero_stage": int(kind)}
    engine = build_engine(network, settings(**own, dtype=NETWORKS[name], warmup_steps=0), **place)
    losses = []
    for step in range(3):
        whole = batch(step, engine.rank)
        parts = [whole.take(index) for index in torch.arange(4).split(2)]
        losses.append(engine.step(loss_of(network), parts, [0.5 / engine.world_size] * 2)["loss"])
    weights, (tensors, _) = engine.weights(), engine.optimizer_state()
    engine.close()
    return {"losses": losses, "weights": content_hash(weights), "state": content_hash(tensors)}


def main(folder: str, rank: str, world: str, port: str, kinds: str) -> None:
    torch.set_num_threads(1)
    flowalign.engine.zero.PERSISTENT = 50  # so that ZeRO-3 partitions matrices and keeps biases whole
    place = {"rank": int(rank), "world_size": int(world), "master_port": int(port)}
    # FSDP comes first: ZeRO-3 gives a process another linear layer for good.
    results = {
        kind: {name: {way: learned(kind, way, name, place) for way in ways_of(kind)} for name in NETWORKS}
        for kind in kinds
    }
    Path(folder, f"recomputed_rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
