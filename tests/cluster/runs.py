"""A small run whose reward takes orders from files: to kill or stop a process, to raise, to answer too little."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flowalign.config.alignment import AlignConfig
from flowalign.config.run import RunConfig
from flowalign.record.checkpoint import content_hash
from flowalign.run.fixed import build_run
from flowalign.types import Scores

REWARD = """
import ctypes, os, signal, time
from pathlib import Path

def brightness(images, prompts, metadata, folder):
    def order(name):
        try:
            text = (Path(folder) / name).read_text()
            (Path(folder) / name).unlink()
            return text
        except FileNotFoundError:
            return None

    victim = order("kill")
    for pid in [] if victim is None else victim.split() or [os.getpid()]:
        os.kill(int(pid), signal.SIGKILL)
    victim = order("stop")
    if victim is not None:
        os.kill(int(victim) if victim else os.getpid(), signal.SIGSTOP)
    if order("leave") is not None:
        os._exit(3)
    if order("crash") is not None:
        ctypes.string_at(0)
    if order("sleep") is not None:
        time.sleep(600)
    if order("raise") is not None:
        raise ValueError("the scale is missing")
    scores = images.astype("float64").mean((1, 2, 3)) / 255
    return scores[:1] if order("shorten") is not None else scores
"""


def small_config(pipeline: Path, folder: Path, *, cluster: dict[str, Any], **changes: Any) -> AlignConfig:
    """24 samples an iteration in chunks of 4; everything on one thread."""
    (folder / "reward.py").write_text(REWARD)
    content = {
        "name": "cluster-test",
        "iterations": 2,
        "model": {"path": str(pipeline), "max_sequence_length": 16},
        "data": {"groups_per_iteration": 6},
        "algorithm": {"type": "flow_grpo", "group_size": 4, "num_steps": 4, "clip_range": 0.1, "guidance_scale": 2.0},
        "rewards": [
            {"spec": "geneval", "options": {"mode": "partial"}, "weight": 0.5},
            {"spec": "reward.py:brightness", "options": {"folder": str(folder)}},
        ],
        "rollout": {"chunk_size": 4},
        "learner": {"engine": "torch", "micro_batch_size": 4, "ema_decay": 0.5},
        "evaluation": {"every": 0},
        "cluster": {"threads": 1, "rollout_cpus": 0.25, "reward_cpus": 0.25, "learner_cpus": 0.25, **cluster},
    }
    return AlignConfig.model_validate({**content, **changes})


@dataclass(frozen=True)
class Trace:
    """What two runs must agree on."""

    scores: list[Scores]
    metrics: list[dict[str, float]]
    weights: dict[str, Tensor]
    weights_hash: str
    ema_hash: str


def trace(backend: Any, config: RunConfig, iterations: int = 2) -> Trace:
    """The alignment loop by hand, without a journal."""
    run = build_run(config)
    backend.sync()
    scores, metrics = [], []
    for iteration in range(iterations):
        plan = run.algorithm.plan(iteration, run.seed)
        collected = backend.collect(run.sampler.batch(iteration), plan, seed=run.seed)
        update = backend.update(collected.trajectories, collected.scores, iteration)
        backend.sync()
        scores.append(collected.scores)
        metrics.append(dict(update.metrics))
    state = backend.state()[0]
    weights = state["model"]
    return Trace(scores, metrics, weights, content_hash(weights), content_hash(state["ema"]))


def assert_same_bits(one: Trace, other: Trace) -> None:
    for a, b in zip(one.scores, other.scores, strict=True):
        assert a.total.equal(b.total)
        assert a.by_reward.keys() == b.by_reward.keys()
        assert all(a.by_reward[name].equal(b.by_reward[name]) for name in a.by_reward)
    assert one.metrics == other.metrics
    assert one.weights_hash == other.weights_hash
    assert one.ema_hash == other.ema_hash
