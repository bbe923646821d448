"""One rank of a part of a run: ``python -m tests.engine.leg DIR RANK WORLD PORT KIND BEGIN END``.

It goes on from the checkpoint BEGIN in DIR, whichever engine wrote it, and writes the checkpoint END.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import flowalign.engine.zero
from flowalign.engine import process_group
from flowalign.engine.average import Average
from flowalign.engine.build import build_engine
from flowalign.engine.convert import load
from flowalign.record import checkpoint
from flowalign.record.checkpointwriter import CheckpointWriter
from flowalign.run.second import states_for
from tests.engine.toy import Network, settings, update

SETTINGS = {"learning_rate": 1e-4, "eps": 1e-5, "warmup_steps": 0}


def main(folder: str, rank: str, world: str, port: str, kind: str, begin: str, end: str) -> None:
    torch.set_num_threads(1)
    flowalign.engine.zero.PERSISTENT = 50
    network = Network()
    own = {"type": "fsdp"} if kind == "f" else {"zero_stage": int(kind)}
    place: dict[str, Any] = {"rank": int(rank), "world_size": int(world), "master_port": int(port)}
    engine = build_engine(network, settings(**SETTINGS, **own), **place)
    average = Average(engine, 0.9)
    if int(begin):
        saved = checkpoint.load(Path(folder) / f"step_{int(begin):06d}")
        said = load(engine, saved.model, states_for(saved.optimizer_by_rank, engine.facts())[engine.rank])
        assert saved.ema is not None
        average.load(saved.ema)
        if engine.rank == 0:
            print(said)
    for step in range(int(begin), int(end)):
        update(engine, network, step)
        average.update()
    model, ema = engine.weights(), average.weights()
    optimizer = process_group.gather(*engine.optimizer_state())
    if engine.rank == 0:
        CheckpointWriter(Path(folder)).save(int(end), model=model, ema=ema, optimizer_by_rank=optimizer, state={})
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
