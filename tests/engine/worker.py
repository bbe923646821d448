"""One rank of the engine tests: runs every scenario for every engine of several ranks and writes what happened.

``python -m tests.engine.worker DIR RANK WORLD PORT KINDS PHASE``, KINDS as in 0123f: ZeRO stages and FSDP2; PHASE is
``train``, and in a new process ``resume``.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import flowalign.engine.zero
from flowalign.engine.average import Average
from flowalign.engine.base import Engine, NonFiniteUpdate, ResumeRefused
from flowalign.engine.build import build_engine
from flowalign.record.checkpoint import content_hash
from flowalign.record.destroyed import DestroyedState
from tests.engine.toy import Network, settings, update


class Rank:
    def __init__(self, folder: Path, rank: int, world: int, port: int) -> None:
        self.folder, self.rank, self.world, self.port = folder, rank, world, port

    def engine(self, kind: str, frozen: torch.dtype = torch.float32, **changes: Any) -> tuple[Engine, Network]:
        network = Network(frozen)
        own = {"type": "fsdp"} if kind == "f" else {"zero_stage": int(kind)}
        built = build_engine(
            network,
            settings(**own, **changes),
            rank=self.rank,
            world_size=self.world,
            master_port=self.port,
        )
        return built, network

    def path(self, kind: str, name: str) -> Path:
        return self.folder / f"{name}_{kind}_rank{self.rank}.safetensors"

    def run(self, kind: str, steps: int, num_micro: int = 2, **changes: Any) -> dict[str, Any]:
        engine, network = self.engine(kind, **changes)
        metrics = [update(engine, network, step, num_micro) for step in range(steps)]
        weights, (tensors, _) = engine.weights(), engine.optimizer_state()
        engine.close()
        return {"metrics": metrics, "weights": weights, "hash": content_hash(weights), "state": content_hash(tensors)}


def state(engine: Engine) -> tuple[str, str]:
    return content_hash(engine.weights()), content_hash(engine.optimizer_state()[0])


def poisoned(rank: Rank, kind: str) -> dict[str, Any]:
    """Two updates, two refused ones (bad on the last rank only), one more update."""
    engine, network = rank.engine(kind)
    for step in range(2):
        update(engine, network, step)
    before, raised = state(engine), []
    for poison in (float("nan"), float("inf")):
        try:
            update(engine, network, 2, poison=poison if rank.rank == rank.world - 1 else 0.0)
        except NonFiniteUpdate as error:
            raised.append(str(error))
    after = state(engine)
    update(engine, network, 2)
    result = {"before": before, "after": after, "raised": raised, "final": state(engine), "steps": engine.steps}
    engine.close()
    return result


def destroyed(rank: Rank, kind: str) -> list[str]:
    """What each rank says where on the last one alone a weight, and then a moment, is lost under an update."""
    raised = []
    for part in range(2):
        engine, network = rank.engine(kind)
        update(engine, network, 0)
        inner: Any = engine
        optimizer, named = inner._adamw, engine.held()
        tensor = named.get("never", list(named.values())[-1])  # no loss is made of it
        lost = tensor.data if part == 0 else optimizer.state[tensor]["exp_avg_sq"]
        if rank.rank == rank.world - 1:
            lost.view(-1)[0] = 1e30 if part else float("nan")
        try:
            update(engine, network, 1)
        except (DestroyedState, NonFiniteUpdate) as error:
            raised.append(f"{type(error).__name__}: {error}")
        engine.close()
    return raised


def reloaded(rank: Rank, kind: str) -> dict[str, Any]:
    """Weights from outside replace those of a trained engine, also for its next update and without its hooks."""
    engine, network = rank.engine(kind)
    update(engine, network, 0)
    wanted = {name: tensor * 0.5 + 0.1 for name, tensor in engine.weights().items()}
    engine.load_weights(wanted)
    same = content_hash(engine.weights()) == content_hash(wanted)
    with torch.no_grad():
        outside = network(torch.ones(1, 6), True).tolist()
    update(engine, network, 1)
    result = {"same": same, "outside": outside, "moved": engine.weights()["first.bias"].tolist()}
    engine.close()
    return result


def averaged(rank: Rank, kind: str) -> dict[str, Any]:
    """Two averages of an engine, against the same arithmetic with its whole weights."""
    engine, network = rank.engine(kind)
    averages = {decay: Average(engine, decay) for decay in (0.9, 0.5)}
    by_hand = {decay: engine.weights() for decay in averages}
    for step in range(3):
        update(engine, network, step)
        for decay, average in averages.items():
            average.update()
            for name, weight in engine.weights().items():
                by_hand[decay][name].mul_(decay).add_(weight, alpha=1 - decay)
    whole = {decay: average.weights() for decay, average in averages.items()}
    before, shown = state(engine), []
    with averages[0.9].bound(), torch.no_grad():
        shown.append(content_hash(engine.weights()) == content_hash(whole[0.9]))
        inside = network(torch.ones(1, 6), True).tolist()
    restored = Average(engine, 0.9)
    restored.load(whole[0.9])
    result = {
        "by_hand": [content_hash(whole[decay]) == content_hash(by_hand[decay]) for decay in averages],
        "shown": [*shown, content_hash(averages[0.9].weights()) == content_hash(whole[0.9])],
        "restored": content_hash(restored.weights()) == content_hash(whole[0.9]),
        "back": state(engine) == before,
        "inside": inside,
    }
    engine.close()
    return result


def train(rank: Rank, kinds: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for kind in kinds:
        whole = rank.run(kind, 10)
        save_file(rank.run(kind, 5)["weights"], rank.path(kind, "weights5"))
        split = rank.run(kind, 5, num_micro=3)
        save_file(split["weights"], rank.path(kind, "split"))
        mixed = rank.run(kind, 3, dtype="bfloat16", frozen=torch.bfloat16)
        engine, network = rank.engine(kind)
        for step in range(5):
            update(engine, network, step)
        tensors, facts = engine.optimizer_state()
        save_file(tensors, rank.path(kind, "optimizer"))
        save_file(engine.weights(), rank.path(kind, "model"))
        rank.path(kind, "facts").with_suffix(".json").write_text(json.dumps(facts))
        engine.close()
        results[kind] = {
            "metrics": whole["metrics"],
            "ten_steps": (whole["hash"], whole["state"]),
            "three_steps": [rank.run(kind, 3)[key] for key in ("hash", "state")],
            "mixed": mixed["metrics"],
            "poisoned": poisoned(rank, kind),
            "reloaded": reloaded(rank, kind),
            "destroyed": destroyed(rank, kind),
            "average": averaged(rank, kind),
        }
    return results


def resume(rank: Rank, kinds: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for kind in kinds:
        facts = json.loads(rank.path(kind, "facts").with_suffix(".json").read_text())
        tensors = load_file(rank.path(kind, "optimizer"))
        engine, network = rank.engine(kind)
        refused = ""
        try:
            engine.load_optimizer_state(tensors, {**facts, "engine": "another", "zero_stage": 2 if kind == "1" else 1})
        except ResumeRefused as error:
            refused = str(error)
        engine.load_weights(load_file(rank.path(kind, "model")))
        engine.load_optimizer_state(tensors, facts)
        metrics = [update(engine, network, step) for step in range(5, 10)]
        results[kind] = {"ten_steps": state(engine), "refused": refused, "metrics": metrics}
        engine.close()
    return results


def forbid_programs() -> None:
    """Let no library start a compiler, or any other program, in this process."""

    def no_compiler(*command: object, **_: object) -> None:
        raise AssertionError(f"DeepSpeed started a program: {command}")

    subprocess.Popen.__init__ = no_compiler  # type: ignore[method-assign]


def main(folder: str, rank: str, world: str, port: str, kinds: str, phase: str) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    flowalign.engine.zero.PERSISTENT = 50  # so that ZeRO-3 partitions matrices and keeps biases whole
    forbid_programs()
    member = Rank(Path(folder), int(rank), int(world), int(port))
    results = {"train": train, "resume": resume}[phase](member, kinds)
    (Path(folder) / f"{phase}_rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
