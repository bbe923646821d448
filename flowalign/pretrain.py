"""Base training on precomputed latents: any algorithm that consumes ``LatentBatch``.

A step is a function of (seed, step): interrupted and resumed runs are bitwise equal.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flowalign import checkpoint
from flowalign.algorithm import seeded
from flowalign.config import PhaseConfig, PretrainConfig
from flowalign.data.latents import LatentBank, load_bank
from flowalign.engine.base import Engine
from flowalign.models.base import Policy
from flowalign.models.ema import Ema
from flowalign.types import Condition, LatentBatch


@dataclass(frozen=True)
class PretrainResult:
    """Where a run left its last checkpoint, and after how many steps."""

    steps: int
    checkpoint: Path


def schedule_at(phases: list[PhaseConfig], warmup: int, step: int) -> tuple[PhaseConfig, float]:
    """The phase of a step and its learning rate: linear warm-up once, cosine within each phase."""
    begin = 0
    for phase in phases:
        if step < begin + phase.steps:
            turn = 0.5 * (1 + math.cos(math.pi * (step - begin) / phase.steps))
            rate = phase.final_learning_rate + (phase.learning_rate - phase.final_learning_rate) * turn
            return phase, rate * min(1.0, (step + 1) / max(1, warmup))
        begin += phase.steps
    raise ValueError(f"step {step} lies behind the last phase, which ends at {begin}")


def text_length(phase: PhaseConfig, seed: int, step: int) -> int:
    """The T5-part length of a step, drawn by the phase's weights."""
    lengths = sorted(phase.max_sequence_lengths)
    weights = torch.tensor([phase.max_sequence_lengths[length] for length in lengths])
    return lengths[int(torch.multinomial(weights, 1, generator=seeded(seed, 3, step)))]


def pretrain(
    config: PretrainConfig,
    policy: Policy,
    algorithm: Any,
    engine: Engine,
    run_dir: Path,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
    stopping: Callable[[], bool] = lambda: False,
) -> PretrainResult:
    """Train until the last phase ends; continues from ``run_dir/checkpoints/latest`` if there is one.

    Where ``stopping`` turns true the step under way is the last one, and is checkpointed.
    """
    bank = load_bank(Path(config.latents))
    longest = max(length for phase in config.phases for length in phase.max_sequence_lengths)
    table = _prompt_table(policy, bank, longest)
    steps = sum(phase.steps for phase in config.phases)
    ema = Ema(engine.weights(), config.ema_decay)
    start = _resume(run_dir, engine, ema)
    models = {"policy": _autocast(policy.velocity, config)}
    began = time.monotonic()
    policy.network.train()
    done = start
    for step in range(start, steps):
        phase, rate = schedule_at(config.phases, config.warmup_steps, step)
        latents, rows = (drawn.to(config.device) for drawn in bank.draw(step, config.batch_size, config.seed))
        condition = _shortened(table, rows, text_length(phase, config.seed, step) - longest)
        batch = algorithm.prepare(LatentBatch(latents, condition, _batch_seed(config.seed, step)), None, models)
        engine.set_learning_rate(rate)
        metrics = engine.step(lambda mini: algorithm.loss(models, mini), [batch], [1.0])
        ema.decay = min(config.ema_decay, (1 + step) / (10 + step))
        ema.update(engine.weights())
        done = step + 1
        if done % config.log_every == 0 or done == steps:
            speed = config.batch_size * (done - start) / (time.monotonic() - began)
            report({"step": done, "steps": steps, **metrics, "throughput/samples_per_s": round(speed, 1)})
        stop = stopping()
        if stop or done % config.checkpoint_every == 0 or done == steps:
            _save(run_dir, config, engine, ema, done)
        if stop:
            break
    policy.network.eval()
    last = checkpoint.latest(run_dir / "checkpoints")
    assert last is not None
    return PretrainResult(done, last)


def _prompt_table(policy: Policy, bank: LatentBank, longest: int) -> Condition:
    policy.max_sequence_length = longest  # type: ignore[attr-defined]
    return policy.encode_prompts(bank.prompts)


def _shortened(table: Condition, rows: torch.Tensor, surplus: int) -> Condition:
    """The prompts of one batch, with ``-surplus`` tokens cut off the end of the text (0: none)."""
    end = table.tokens_PLD.shape[1] + surplus
    used, index = torch.unique(rows, return_inverse=True)
    return replace(
        table,
        tokens_PLD=table.tokens_PLD[used, :end],
        pooled_PE=table.pooled_PE[used],
        null_LD=table.null_LD[:end],
        index_N=index,
    )


def _batch_seed(seed: int, step: int) -> int:
    return seed * 1_000_003 + step


def _autocast(velocity: Callable[..., torch.Tensor], config: PretrainConfig) -> Callable[..., torch.Tensor]:
    if config.autocast == "float32":
        return velocity

    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast(config.device.split(":")[0], torch.bfloat16):
            return velocity(*args, **kwargs).float()

    return call


def _resume(run_dir: Path, engine: Engine, ema: Ema) -> int:
    path = checkpoint.latest(run_dir / "checkpoints")
    if path is None:
        return 0
    saved = checkpoint.load(path)
    engine.load_weights(saved.model)
    engine.load_optimizer_state(*saved.optimizer_of(engine.rank))
    if saved.ema is not None:
        ema.load(saved.ema)
    return int(saved.state["step"])


def _save(run_dir: Path, config: PretrainConfig, engine: Engine, ema: Ema, step: int) -> None:
    checkpoint.CheckpointWriter(run_dir / "checkpoints", config.keep_last).save(
        step,
        model=engine.weights(),
        ema=ema.state(),
        optimizer_by_rank={engine.rank: engine.optimizer_state()},
        state={"step": step, "config": json.loads(config.model_dump_json())},
    )
