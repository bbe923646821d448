"""One rank that learns with moments, average and frozen blocks on its device, and on disk.

``python -m tests.engine.offloaded DIR RANK WORLD PORT KINDS``, KINDS as in f0123: FSDP2 and ZeRO stages. What it
learns is the MM-DiT of ``tests.engine.recomputed``, whole, by a LoRA, and by a LoRA on a base of 8 bits.

Half of a run goes on from what the other half has saved. Writes of each run the losses of all updates, the hashes of
weights, average and optimizer's state after them, and what is left on disk.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import flowalign.engine.piecewise
import flowalign.engine.zero
from flowalign.engine.average import Average
from flowalign.engine.build import build_engine
from flowalign.engine.offload import Offload
from flowalign.models.activation_checkpointing import checkpoint_activations
from flowalign.models.stored_linear import store_base
from flowalign.record.checkpoint import content_hash
from tests.engine.recomputed import batch, loss_of, transformer
from tests.engine.toy import settings

WAYS = {"never": ("none", "none"), "first": ("disk", "none"), "then": ("host", "disk")}
NETWORKS = {"whole": "float32", "lora": "bfloat16", "int8": "bfloat16"}
ANEW = {"whole": "none", "lora": "blocks", "int8": "none"}


def learned(kind: str, way: str, name: str, place: dict[str, Any], folder: Path) -> dict[str, Any]:
    losses, model, mean, saved = [], None, None, None
    for leg, kept in enumerate(WAYS[way]):
        # On a CPU `host` copies as it does to a GPU.
        offload = None if kept == "none" else Offload(kept, folder)  # type: ignore[arg-type]
        network = transformer(name != "whole")
        if name == "int8":
            store_base(network, "int8")
        checkpoint_activations(network, ANEW[name])
        own = {"type": "fsdp"} if kind == "f" else {"type": "torch"} if kind == "t" else {"zero_stage": int(kind)}
        engine = build_engine(network, settings(**own, dtype=NETWORKS[name], warmup_steps=0, offload=offload), **place)
        average = Average(engine, 0.9, offload)
        if saved is not None:
            assert model is not None and mean is not None
            engine.load_weights(model)
            engine.load_optimizer_state(*saved)
            average.load(mean)
        for step in range(2 * leg, 2 * leg + 2):
            whole = batch(step, engine.rank)
            parts = [whole.take(index) for index in torch.arange(4).split(2)]
            losses.append(engine.step(loss_of(network), parts, [0.5 / engine.world_size] * 2)["loss"])
            average.update()
        with average.bound(), torch.no_grad():
            losses.append(float(loss_of(network)(batch(9, engine.rank)).loss))
        model, mean, saved = engine.weights(), average.weights(), engine.optimizer_state()
        engine.close()
    assert model is not None and mean is not None and saved is not None
    hashes = {"weights": content_hash(model), "average": content_hash(mean), "state": content_hash(saved[0])}
    return {"losses": losses, **hashes, "left": [path.name for path in folder.iterdir()]}


def main(folder: str, rank: str, world: str, port: str, kinds: str) -> None:
    torch.set_num_threads(1)
    flowalign.engine.zero.PERSISTENT = 50  # so that ZeRO-3 partitions matrices and keeps biases whole
    flowalign.engine.piecewise.PIECE = 1000
    place = {"rank": int(rank), "world_size": int(world), "master_port": int(port)}
    away = Path(folder, f"away{rank}")
    away.mkdir()
    # FSDP comes first: ZeRO-3 gives a process another linear layer for good.
    results = {
        kind: {name: {way: learned(kind, way, name, place, away) for way in WAYS} for name in NETWORKS}
        for kind in kinds
    }
    Path(folder, f"offloaded_rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
