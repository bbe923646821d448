"""Drives a training run on latents: ranks, networks, resume, metrics. What ``pretrain`` and ``distill`` call."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from flowalign.algorithm import Needs, VelocityModel
from flowalign.algorithms import build_algorithm
from flowalign.config.section import ConfigError
from flowalign.config.training import PretrainConfig
from flowalign.data.banks.latents import load_bank
from flowalign.engine import process_group
from flowalign.engine.base import Engine, EngineSettings
from flowalign.engine.build import build_engine
from flowalign.models.build import bind_weights, count_parameters, frozen_copy, load_encoders, load_network
from flowalign.models.fingerprint import encoders_of, same_encoders
from flowalign.models.guided import frozen
from flowalign.models.inspect import own_schedule
from flowalign.models.network import Network
from flowalign.models.perceptual import ImageFeatures
from flowalign.models.textlength import prompt_note
from flowalign.record import checkpoint
from flowalign.record.checkpoint import Checkpoint
from flowalign.record.lock import RunLock
from flowalign.record.metrics import MetricsWriter
from flowalign.record.progress import PLAIN, Phases, Progress, duration
from flowalign.record.stop import EndedEarly, StopRequest
from flowalign.run.encoded import encode_captions
from flowalign.run.made import Accepted, MadeOf
from flowalign.run.pretrain import pretrain, resumed
from flowalign.run.resume import leave_behind, refuse_older, resume_from


@dataclass(frozen=True)
class Rank:
    """This process among those that torchrun started; alone where it did not."""

    index: int = 0
    world_size: int = 1
    local: int = 0
    host: str = "127.0.0.1"
    port: int = 0

    @classmethod
    def of_environment(cls) -> Rank:
        env = os.environ
        if "WORLD_SIZE" not in env:
            return cls()
        numbers = (int(env[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        one_host = env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]
        return cls(*numbers, host=cls.host if one_host else env["MASTER_ADDR"], port=int(env["MASTER_PORT"]))

    def device(self, configured: str) -> str:
        """Return this rank's device: one GPU a process."""
        return f"cuda:{self.local}" if configured == "cuda" else configured


@dataclass
class Roles:
    """The networks that an algorithm asks for beside the policy."""

    models: dict[str, VelocityModel] = field(default_factory=dict)
    follower: Callable[[dict[str, Tensor]], object] | None = None


def run_pretrain(
    config: PretrainConfig,
    base_dir: Path,
    console: Console,
    begin: Callable[[], object] = lambda: None,
    phases: Phases | None = None,
    *,
    command: str = "pretrain",
    lock: RunLock | None = None,
    stop: StopRequest | None = None,
    accepted: Accepted | None = None,
) -> Path:
    """Run (or resume) a training run to its last step; returns the run directory.

    ``begin`` is called in the first rank, once all that the run needs stands, before the run directory is written to
    (but for its lock). ``phases``, begun by the caller, is told when work begins and when it ends. Without ``lock`` and
    ``stop`` it holds the directory and listens for signals by itself; of several ranks the first holds it. ``accepted``
    names what may have changed since a checkpoint, and is told of what has.

    Raises:
        EndedEarly: somebody asked for the end; what was learned is in the last checkpoint.
        RunDirectoryError, LockLost: another process holds the run directory, or took it over.
        CheckpointError, ResumeRefused: the run directory cannot be continued.
        LatentsError, ModelError, ConfigError: what the run needs cannot be had, or has changed since its checkpoint.
        NonFiniteUpdate: loss or gradient is no number any more; the weights before it are in the last checkpoint.
    """
    rank, run_dir = Rank.of_environment(), Path(config.runs_dir) / config.name
    with ExitStack() as stack:
        stop = stop or stack.enter_context(StopRequest("step", alone=rank.world_size == 1).on_signals())
        if lock is None and rank.index == 0:
            lock = stack.enter_context(RunLock.take(run_dir))
            stack.enter_context(stop.watching(lock))
        made = MadeOf(config, base_dir, accepted) if rank.index == 0 else None
        if made is not None:
            stack.callback(made.close)
        _run(config, console, begin, phases or Phases(), command, rank, lock, stop, made)
    return run_dir


def _run(
    config: PretrainConfig,
    console: Console,
    begin: Callable[[], object],
    phases: Phases,
    command: str,
    rank: Rank,
    lock: RunLock | None,
    stop: StopRequest,
    made: MadeOf | None,
) -> None:
    run_dir = Path(config.runs_dir) / config.name
    torch.set_num_threads(config.threads)
    console = console if rank.index == 0 else Console(quiet=True)
    config = config.on(rank.device(config.device))
    say = partial(console.print, **PLAIN)
    saved, steps = _saved(config, run_dir, rank, say), config.steps
    if saved is not None and saved.step >= steps:
        more = "add a phase to `phases`" if config.phases else "raise `iterations`"
        say(f"{run_dir} has done all {saved.step} steps already; {more} to continue")
        return
    refuse_older(saved)
    algorithm = build_algorithm(config.algorithm, own_schedule(config.model))
    _say_start(config, console, run_dir, rank, anew=saved is None)
    if replaced := algorithm.replaced_levels():
        console.print(f"levels: {replaced}", **PLAIN)
    loading = time.monotonic()
    network = load_network(config.model)
    roles = build_roles(config, network, algorithm.needs)
    trained, total = count_parameters(network.module)
    engine = _engine(config, network, rank)
    stop.meet()
    beside = "".join(f", beside its {role}" for role in sorted(roles.models))
    say(
        f"model: {config.model.path}{beside}, {trained:,} of {total:,} parameters are trained; "
        f"loaded in {duration(time.monotonic() - loading)}"
    )
    with process_group.failing_together():
        if rank.local == 0:  # of each machine
            encode_captions(config)
    saved = resumed(run_dir, rank.index, saved)
    start = 0 if saved is None else saved.step
    with process_group.failing_together():
        if saved is not None and made is not None:
            made.refuse_changes(saved, say, small=True)
            made.refuse_changes(saved, say)
    if start:
        console.print(f"resuming {run_dir} after step {start}", **PLAIN)
    take = partial(_take, run_dir, config.checkpoint.resume, saved, say, begin)
    report = None if lock is None else _Reporter(config, lock, console, start, take, command)

    def ready() -> None:
        phases.begin("work")
        if made is not None:
            made.check_steady()
        if report is not None:
            report.begin()

    try:
        result = pretrain(
            config,
            network,
            algorithm,
            engine,
            run_dir,
            report or (lambda row: None),
            stop,
            lock,
            begin=ready,
            saved=saved,
            models=roles.models,
            follower=roles.follower,
            facts=dict if made is None else made.facts,
            say=say,
        )
    finally:
        phases.begin("end")
        if report is not None:
            report.close()
        engine.close()
    if result.steps < steps:
        raise EndedEarly


def _saved(config: PretrainConfig, run_dir: Path, rank: Rank, say: Callable[[str], object]) -> Checkpoint | None:
    """Return the checkpoint that the first rank goes on from.

    The others, which cannot ask it before their engines stand, look at it alone where a run may be finished: then none
    of them begins.

    Raises:
        CheckpointError: there is nothing that the run can go on from, though it was begun.
    """
    last = max(checkpoint.steps(run_dir / "checkpoints"), default=0)
    if rank.index and last < config.steps:
        return None
    return resume_from(run_dir, config.checkpoint.resume, say, key="checkpoint.resume")


def _take(
    run_dir: Path, resume: str, saved: Checkpoint | None, say: Callable[[str], object], begin: Callable[[], object]
) -> None:
    leave_behind(run_dir, resume, saved, say)
    begin()


def build_roles(config: PretrainConfig, network: Network, needs: Needs) -> Roles:
    """Load the teacher, copy the policy for its average, take apart the features: all that an algorithm ``needs``.

    Raises:
        ConfigError: a teacher is missing, or does not share the student's latents.
    """
    roles = Roles()
    if needs.teacher:
        if config.teacher is None:
            raise ConfigError("teacher", f"{config.algorithm['type']} needs one; give teacher.path")
        roles.models["teacher"] = frozen(_teacher(config, network))
    if needs.average:
        average = frozen_copy(network, config.device)
        roles.models["ema"] = frozen(average)
        roles.follower = lambda weights: bind_weights(average.module, weights)
    if needs.features:
        decoder = load_encoders(config.model, text=False).to(config.device)
        roles.models["features"] = ImageFeatures(decoder, Path(config.features))  # type: ignore[assignment]
    return roles


def _teacher(config: PretrainConfig, network: Network) -> Network:
    assert config.teacher is not None
    teacher = load_network(config.teacher)
    mine, theirs = network.latent_shape(), teacher.latent_shape()
    if mine != theirs or not same_encoders(encoders_of(config.model), encoders_of(config.teacher)):
        raise ConfigError(
            "teacher.path",
            f"{config.teacher.path} has latents {theirs} or encoders other than the student's {mine}; a teacher must "
            "share the student's autoencoder and text encoders",
        )
    teacher.module.requires_grad_(False).eval().to(config.device)
    return teacher


def _engine(config: PretrainConfig, network: Network, rank: Rank) -> Engine:
    learner, optimizer = config.learner, config.learner.optimizer
    if config.phases:  # whose rates are set step by step
        own = {"learning_rate": config.phases[0].learning_rate, "warmup_steps": 0}
        optimizer = optimizer.model_copy(update=own)
    settings = EngineSettings(
        type=learner.engine,
        zero_stage=learner.zero_stage,  # type: ignore[arg-type]
        optimizer=optimizer,
        compile=learner.compile,
    )
    return build_engine(
        network.module,
        settings,
        rank=rank.index,
        world_size=rank.world_size,
        master_port=rank.port,
        master_addr=rank.host,
        device=config.device,
    )


class _Reporter:
    """Rows of metrics.jsonl, and a line of the terminal with each."""

    def __init__(
        self,
        config: PretrainConfig,
        lock: RunLock,
        console: Console,
        start: int,
        begin: Callable[[], object],
        command: str,
    ) -> None:
        self._config, self._lock, self._start, self._begin = config, lock, start, begin
        self._console, self._command = console, command
        self._writer: MetricsWriter | None = None
        self._progress: Progress | None = None
        self._began = time.monotonic()

    def begin(self) -> None:
        """Open the files and the bar; nothing is written before."""
        self._begin()
        run_dir, config = self._lock.run_dir, self._config
        self._writer = MetricsWriter(run_dir, config.name, config.logging, keep_until=self._start, each=False)
        steps = config.steps
        self._progress = Progress(self._console, steps, self._start, command=self._command)
        self._began = time.monotonic()

    def __call__(self, row: dict[str, Any]) -> None:
        assert self._writer is not None and self._progress is not None
        self._lock.check()
        step, steps = int(row.pop("step")), int(row.pop("steps"))
        self._writer.write(step, row, wall_s=time.monotonic() - self._began)
        eta_s = (steps - step) * self._config.learner.batch_size / max(row["throughput/samples_per_s"], 0.1)
        said = [f"loss {row['loss']:.4f}"]
        if "validation_ema/loss" in row:
            said.append(f"validation {row['validation/loss']:.4f} (average {row['validation_ema/loss']:.4f})")
        said.append(f"{row['throughput/samples_per_s']:.4g} samples/s")
        self._progress.show(step, "  ".join(said), eta_s)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        if self._writer is not None:
            self._writer.close()


def _say_start(config: PretrainConfig, console: Console, run_dir: Path, rank: Rank, *, anew: bool) -> None:
    steps = config.steps
    ranks, threads = rank.world_size, config.threads
    for line in (
        f"run directory: {run_dir}{', begun anew' if anew else ''}",
        f"{ranks} process{'es' * (ranks > 1)} on {config.device}, {threads} thread{'s' * (threads > 1)} each",
        f"latents: {config.latents}, {steps} steps of {config.learner.batch_size} samples",
    ):
        console.print(line, **PLAIN)
    if rank.index == 0:
        captions = load_bank(Path(config.latents), verify=False).prompts
        if note := prompt_note(Path(config.model.path), captions):
            console.print(f"captions: {len(captions)}; {note}", **PLAIN)
