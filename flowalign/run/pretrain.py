"""Training on precomputed latents: any algorithm that consumes ``LatentBatch``, with or without a teacher.

A step is a function of (seed, step): interrupted and resumed runs are bitwise equal.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.algorithm import Algorithm, Models, VelocityModel, prepared
from flowalign.config.training import PhaseConfig, PretrainConfig
from flowalign.data.feed import Feed
from flowalign.engine import process_group
from flowalign.engine.average import Average
from flowalign.engine.base import Engine
from flowalign.engine.convert import load
from flowalign.flow.randomness import Stream, seeded
from flowalign.measure.validation import Validation
from flowalign.models.guided import guided
from flowalign.models.network import Network
from flowalign.record import checkpoint
from flowalign.record.checkpointwriter import CheckpointWriter
from flowalign.record.destroyed import naming
from flowalign.record.lock import RunLock
from flowalign.record.stop import EndedEarly, StopRequest
from flowalign.run.second import states_for
from flowalign.types import TrainBatch


@dataclass(frozen=True)
class PretrainResult:
    """The path of a run's last checkpoint, and the number of its steps."""

    steps: int
    checkpoint: Path


def schedule_at(config: PretrainConfig, step: int) -> tuple[PhaseConfig, float]:
    """Return the phase of a step and its learning rate: linear warm-up once, cosine within each phase.

    Without phases the rate is the optimizer's own.
    """
    begin, optimizer = 0, config.learner.optimizer
    for phase in config.stretches:
        if step < begin + phase.iterations:
            if not config.phases:
                return phase, optimizer.learning_rate_at(step)
            turn = 0.5 * (1 + math.cos(math.pi * (step - begin) / phase.iterations))
            rate = phase.final_learning_rate + (phase.learning_rate - phase.final_learning_rate) * turn
            return phase, rate * min(1.0, (step + 1) / max(1, optimizer.warmup_steps))
        begin += phase.iterations
    raise ValueError(f"step {step} lies behind the last phase, which ends at {begin}")


def text_length(phase: PhaseConfig, seed: int, step: int) -> int:
    """Return the T5-part length of a step, drawn by the phase's weights."""
    lengths = sorted(phase.max_sequence_lengths)
    weights = torch.tensor([phase.max_sequence_lengths[length] for length in lengths])
    return lengths[int(torch.multinomial(weights, 1, generator=seeded(seed, Stream.TEXT_LENGTH, step)))]


class Averages:
    """The exponential averages of a run's weights, and the network that the first of them is bound to.

    Their decays rise from 0 as ``(1 + n) / (10 + n)`` after n updates. ``follower`` is called with the first average
    after each update.
    """

    def __init__(
        self,
        engine: Engine,
        config: PretrainConfig,
        follower: Callable[[dict[str, Tensor]], object] | None = None,
    ) -> None:
        self._every = config.learner.ema_every
        self._averages = {decay: Average(engine, decay) for decay in config.learner.ema_decays}
        self._first, *self._others = self._averages
        self._follower = follower

    def update(self, step: int) -> None:
        """Take in the weights after ``step``, counted from 0; a collective call."""
        if (step + 1) % self._every:
            return
        updates = step // self._every
        for decay, average in self._averages.items():
            average.decay = min(decay, (1 + updates) / (10 + updates))
            average.update()
        self._follow()

    @property
    def main(self) -> Average:
        return self._averages[self._first]

    def others(self) -> dict[str, dict[str, Tensor]]:
        """Return all but the first, by the name of their file; a collective call."""
        return {f"ema_{decay:g}": self._averages[decay].weights() for decay in self._others}

    def load(self, saved: checkpoint.Checkpoint) -> None:
        """Load the averages. Raise CheckpointError where one of them was not saved."""
        for decay, average in self._averages.items():
            found = saved.ema if decay == self._first else saved.averages.get(f"ema_{decay:g}")
            if found is None:
                raise checkpoint.CheckpointError(f"{saved.path} has no average of decay {decay:g}; see ema_decay")
            average.load(found)
        self._follow()

    def _follow(self) -> None:
        if self._follower is not None:
            self._follower(self.main.weights())


def pretrain(
    config: PretrainConfig,
    network: Network,
    algorithm: Algorithm,
    engine: Engine,
    run_dir: Path,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
    stop: StopRequest | None = None,
    lock: RunLock | None = None,
    *,
    begin: Callable[[], object] = lambda: None,
    saved: checkpoint.Checkpoint | None = None,
    models: Mapping[str, VelocityModel] | None = None,
    follower: Callable[[dict[str, Tensor]], object] | None = None,
    facts: Callable[[], dict[str, Any]] = dict,
    say: Callable[[str], object] = lambda text: None,
) -> PretrainResult:
    """Train until the last phase ends; continues from ``saved``, see `resumed`.

    ``begin`` is called when data and checkpoint are there, before the first step.
    ``models`` are those that the algorithm asks for beside the policy; ``follower`` binds the average to one of them.
    ``facts``, asked of the first rank, go into each checkpoint's state. ``say`` gets a line where ``saved`` is of
    another engine.
    Where ``stop`` was asked for, the step under way is the last one, and is checkpointed. Of several ranks the first
    reports and writes, while ``lock`` is its own.

    Raises:
        EndedEarly: ``stop`` was asked for before the first step.
        NonFiniteUpdate, DestroyedState: what came of a step is no state to go on from; nothing of it was saved.
        LockLost: another process holds the run directory.
        OtherRankFailed: another rank could not go on, and says why.
    """
    stop = stop or StopRequest()
    with process_group.failing_together():
        feed = Feed(config)
        validation = None if config.validation is None else Validation(config)
    steps = config.steps
    averages = Averages(engine, config, follower)
    start = 0 if saved is None else _load(saved, engine, averages, say)
    called = {"policy": autocast(guided(network), config)}
    others = dict(models or {})
    called |= {role: others.pop(role) for role in ("features",) if role in others}  # maps, not a velocity
    called |= {role: autocast(model, config) for role, model in others.items()}
    if process_group.agreed(stop.asked):
        raise EndedEarly
    with process_group.failing_together():
        begin()
    stop.begin()
    began = time.monotonic()
    network.module.train()
    done = start
    for step in range(start, steps):
        phase, rate = schedule_at(config, step)
        _, batch = prepared(algorithm, feed.batch(step, text_length(phase, config.seed, step)), None, called)
        engine.set_learning_rate(rate)
        with naming(f"step {step + 1}"):
            metrics = _update(engine, algorithm, called, batch, config.learner.micro_batch_size or len(batch))
            averages.update(step)
        done = stop.done = step + 1
        row = _validated(validation, config, network, averages, done, steps)
        if row or done % config.logging.every == 0 or done == steps:
            speed = config.learner.batch_size * (done - start) / (time.monotonic() - began)
            with process_group.failing_together():
                report({"step": done, "steps": steps, **metrics, **row, "throughput/samples_per_s": round(speed, 1)})
        stopping = process_group.agreed(stop.asked)  # or one rank would wait for ever for the others
        if stopping or done % config.checkpoint.every == 0 or done == steps:
            _save(run_dir, config, engine, averages, done, lock, facts)
            stopping = stopping or process_group.agreed(stop.asked)
        if stopping:
            break
    network.module.eval()
    last = checkpoint.latest(run_dir / "checkpoints")
    assert last is not None
    return PretrainResult(done, last)


def _update(engine: Engine, algorithm: Algorithm, models: Models, batch: TrainBatch, size: int) -> dict[str, float]:
    """Make one optimizer step over a batch, whose micro-batches the ranks share."""
    parts = list(torch.arange(len(batch)).split(size))
    if len(parts) == engine.world_size == 1:
        return engine.step(lambda mini: algorithm.loss(models, mini), [batch], [1.0])
    weights = [len(part) / len(batch) for part in parts]
    while len(parts) % engine.world_size:
        parts.append(parts[-1])
        weights.append(0.0)
    mine = slice(engine.rank, None, engine.world_size)
    device = next(iter(batch.tensors.values())).device
    micro_batches = [batch.take(part.to(device)) for part in parts[mine]]
    return engine.step(lambda mini: algorithm.loss(models, mini), micro_batches, weights[mine])


def _validated(
    validation: Validation | None,
    config: PretrainConfig,
    network: Network,
    averages: Averages,
    done: int,
    steps: int,
) -> dict[str, float]:
    """Return the validation loss of the weights and of their average, where it is due."""
    if validation is None or config.validation is None or (done % config.validation.every and done != steps):
        return {}
    network.module.eval()
    velocity = autocast(guided(network), config)
    row = validation.losses(velocity, "validation")
    with averages.main.bound():
        row |= validation.losses(velocity, "validation_ema")
    network.module.train()
    return row


def autocast(velocity: VelocityModel, config: PretrainConfig) -> VelocityModel:
    """Return ``velocity`` in the configured precision; its result is float32."""
    if config.learner.dtype == "float32":
        return velocity

    def call(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(config.device.split(":")[0], torch.bfloat16):
            return velocity(*args, **kwargs).float()

    return call


def resumed(run_dir: Path, rank: int, saved: checkpoint.Checkpoint | None) -> checkpoint.Checkpoint | None:
    """Return the state that the run goes on from: ``saved``, which the first rank has found, and all read the same.

    A collective call.

    Raises:
        CheckpointError: it cannot be read.
    """
    step = process_group.largest(0 if saved is None else saved.step)
    with process_group.failing_together():
        return checkpoint.load(run_dir / "checkpoints" / f"step_{step:06d}") if rank and step else saved


def _load(saved: checkpoint.Checkpoint, engine: Engine, averages: Averages, say: Callable[[str], object]) -> int:
    state = states_for(saved.optimizer_by_rank, engine.facts())[engine.rank]
    if (line := load(engine, saved.model, state)) is not None:
        say(line)
    averages.load(saved)
    return int(saved.state["step"])


def _save(
    run_dir: Path,
    config: PretrainConfig,
    engine: Engine,
    averages: Averages,
    step: int,
    lock: RunLock | None,
    facts: Callable[[], dict[str, Any]],
) -> None:
    model, optimizer = engine.weights(), process_group.gather(*engine.optimizer_state())
    average, others = averages.main.weights(), averages.others()
    with process_group.failing_together():
        if lock is not None:
            lock.check()
        if engine.rank == 0:
            CheckpointWriter(run_dir / "checkpoints", config.checkpoint.keep_last).save(
                step,
                model=model,
                ema=average,
                averages=others,
                optimizer_by_rank=optimizer,
                state={"step": step, "config": json.loads(config.model_dump_json()), **facts()},
            )
