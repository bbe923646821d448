"""One rank of a learner over gloo: every algorithm's updates on the mixture, written as weights and metrics.

``python -m tests.algorithms.rank DIR RANK WORLD PORT``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flowalign.algorithm import VelocityModel
from flowalign.types import Condition
from tests.algorithms.cases import CASES
from tests.algorithms.seams.toys import both, directed, learned, listwise

# All but the one whose teachers take a training of their own.
NAMES = [name for name in CASES if name != "opd aligned teachers"]
ITERATIONS = 2
# Two updates of each batch, of micro-batches that leave the second rank without one now and then.
OPTIONS = {"updates_per_iteration": 2, "micro_batch_size": 48, "ema_decay": 0.5}


def asked(place: dict[str, Any]) -> dict[str, int]:
    """Points that a rank has its networks say something of before the first update of an iteration."""
    counts = {"nft": 0, "opd": 0}

    def counted(name: str, model: VelocityModel) -> VelocityModel:
        def call(x: Tensor, t: Tensor, condition: Condition, **options: Any) -> Tensor:
            counts[name] += 0 if torch.is_grad_enabled() else len(x)
            return model(x, t, condition, **options)

        return call

    for name, case in (("nft", CASES["nft on-policy"]), ("opd", CASES["opd sde"])):
        run = case.build(place=place, micro_batch_size=4, groups=8)
        roles = ["policy"] if name == "nft" else [role for role in run.learner.models if role != "policy"]
        run.learner.models.update({role: counted(name, run.learner.models[role]) for role in roles})
        run.step(0)
    return counts


def main(folder: str, rank: str, world: str, port: str) -> None:
    torch.set_num_threads(1)
    place: dict[str, Any] = {"rank": int(rank), "world_size": int(world), "master_port": int(port)}
    for name in NAMES:
        run = CASES[name].build(place=place, **{**OPTIONS, "epochs": 1, "groups": 8})
        metrics = [dict(run.step(iteration).metrics) for iteration in range(ITERATIONS)]
        file = Path(folder) / f"{name}_{rank}.safetensors"
        save_file(run.learner.engine.weights(), file)
        file.with_suffix(".json").write_text(json.dumps(metrics))
    save_file(both(learned(**place)), Path(folder) / f"second_{rank}.safetensors")
    groups, _ = listwise(4, **place)
    save_file(groups.weights(), Path(folder) / f"listwise_{rank}.safetensors")
    walked, _ = directed(3, **place)
    save_file(walked.weights(), Path(folder) / f"directed_{rank}.safetensors")
    (Path(folder) / f"asked_{rank}.json").write_text(json.dumps(asked(place)))


if __name__ == "__main__":
    main(*sys.argv[1:])
