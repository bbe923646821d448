"""Drives a run: backend, resume, the loop, checkpoints, the report. What the CLI calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from flowalign.algorithms import build_algorithm
from flowalign.config.alignment import AlignConfig
from flowalign.config.sections import SHIPPED
from flowalign.data.preferences import left_out
from flowalign.data.prompts import GroupSampler, evaluation_batch, load_prompts
from flowalign.models.inspect import own_schedule
from flowalign.models.textlength import prompt_note
from flowalign.record import checkpoint
from flowalign.record.lock import RunLock
from flowalign.record.progress import PLAIN, Phases, duration
from flowalign.record.stop import EndedEarly, StopRequest
from flowalign.run.attempts import Attempts
from flowalign.run.local import LocalBackend
from flowalign.run.loop import Run
from flowalign.run.made import Accepted, MadeOf
from flowalign.run.resume import leave_behind, refuse_older, resume_from
from flowalign.run.second import states_for
from flowalign.safety.collapse import stopped_by_alarm
from flowalign.samples.opened import sampling_plan
from flowalign.types import PromptBatch, SamplingPlan

Say = Callable[[str], None]
MakeBackend = Callable[[AlignConfig, Path, Say, MadeOf], Any]


def local_backend(config: AlignConfig, base_dir: Path, say: Say, made: MadeOf) -> LocalBackend:
    """Make the backend of this process alone.

    Raises:
        ValueError: ``config`` asks for Ray, whose backend must be handed over.
    """
    if config.cluster.backend != "local":
        raise ValueError(f"cluster.backend: {config.cluster.backend} needs flowalign.cluster.ray_backend.RayBackend")
    return LocalBackend(config, base_dir, say)


def run_align(
    config: AlignConfig,
    base_dir: Path,
    console: Console,
    begin: Callable[[], object] = lambda: None,
    phases: Phases | None = None,
    *,
    lock: RunLock | None = None,
    stop: StopRequest | None = None,
    accepted: Accepted | None = None,
    backend: MakeBackend = local_backend,
) -> Path:
    """Run (or resume) an alignment to its last iteration, or to where an alarm stops it; returns the run directory.

    ``begin`` is called once all that the run needs stands, before the run directory is written to (but for its lock).
    ``phases``, begun by the caller, is told when work begins and when it ends. Without ``lock`` and ``stop`` it holds
    the directory and listens for signals by itself. ``accepted`` names what may have changed since a checkpoint, and is
    told of what has. ``backend`` makes what rolls out, scores and learns: for ``cluster.backend: ray`` it is
    ``flowalign.cluster.ray_backend.RayBackend``.

    Raises:
        ConfigError: what the run is made of has changed since its checkpoint, or while it was started.
        EndedEarly: somebody asked for the end; what was learned is in the last checkpoint.
        RunDirectoryError, LockLost: another process holds the run directory, or took it over.
        CheckpointError, ResumeRefused: the run directory cannot be continued.
        RankLost: ranks of the learner were lost too often, or twice alike in one iteration.
        PlacementError, ScorerError, TooManyInvalid, SyncError, NonFiniteUpdate: see their modules.
    """
    run_dir = Path(config.runs_dir) / config.name
    with ExitStack() as stack:
        stop = stop or stack.enter_context(StopRequest().on_signals())
        if lock is None:
            lock = stack.enter_context(RunLock.take(run_dir))
            stack.enter_context(stop.watching(lock))
        _run(config, base_dir, console, begin, phases or Phases(), lock, stop, accepted, backend)
    return run_dir


def _run(
    config: AlignConfig,
    base_dir: Path,
    console: Console,
    begin: Callable[[], object],
    phases: Phases,
    lock: RunLock,
    stop: StopRequest,
    accepted: Accepted | None,
    make_backend: MakeBackend,
) -> None:
    run_dir = lock.run_dir
    resume, say = config.checkpoint.resume, partial(console.print, **PLAIN)
    saved = resume_from(run_dir, resume, say)
    start = 0 if saved is None else int(saved.state["iteration"])
    if start >= config.iterations:
        say(f"{run_dir} has done all {start} iterations already; raise `iterations` to continue")
        return
    if saved is not None and stopped_by_alarm(run_dir, config.safety, start) is not None:
        return
    refuse_older(saved)
    made = MadeOf(config, base_dir, accepted)
    if saved is not None:
        made.refuse_changes(saved, say, small=True)
    run = build_run(config, base_dir)
    say(f"run directory: {run_dir}" + ("" if saved else ", begun anew"))
    for line in found(config, run):
        say(line)
    loading = time.monotonic()
    backend = make_backend(config, base_dir, say, made)

    def restore(found: checkpoint.Checkpoint) -> None:
        if (line := backend.restore(_states(config, found, made))) is not None:
            say(line)

    attempts = Attempts(config, backend, restore, console=console, made=made, lock=lock, stop=stop)
    try:
        for line in _loaded(config, *backend.parameters(), seconds=time.monotonic() - loading):
            say(line)
        if saved is not None:
            made.refuse_changes(saved, say)
            restore(saved)
            say(f"resuming {run_dir} after iteration {start}")
        made.check_steady()
        leave_behind(run_dir, resume, saved, say)
        begin()
        phases.begin("work")
        done = attempts.work(run, start, 0.0 if saved is None else float(saved.state["wall_s"]))
    finally:
        phases.begin("end")
        attempts.close()
        backend.close()
        made.close()
    if done < config.iterations and not attempts.stopped:
        raise EndedEarly


def _loaded(config: AlignConfig, trained: int, total: int, seconds: float) -> Iterator[str]:
    """Yield lines on what the backend has loaded: the model, and preference pairs that it leaves out."""
    adapter = "" if config.model.lora is None else f", a LoRA of rank {config.model.lora.rank}"
    yield (
        f"model: {_named(config.model.path)}, {trained:,} of {total:,} parameters are trained{adapter}; "
        f"loaded in {duration(seconds)}"
    )
    if (line := left_out(config)) is not None:
        yield line


def found(config: AlignConfig, run: Run) -> Iterator[str]:
    """Yield sentences on what there is to learn from and to evaluate with.

    They say how many of the prompts the text encoders cut, and whose shift the configuration's replaces.
    """
    data, model = config.data, Path(config.model.path)
    batch = f"{data.groups_per_iteration} groups of {run.algorithm.needs.group_size} images an iteration"
    if data.preferences is not None:
        yield f"preference pairs: {data.preferences}, {data.groups_per_iteration} an iteration"
    elif isinstance(run.sampler, GroupSampler):
        note = prompt_note(model, run.sampler.prompts)
        yield f"prompts: {len(run.sampler.prompts)} of {data.prompts}, {batch}" + (note and f"; {note}")
    replaced = run.algorithm.replaced_levels()
    if replaced is not None and data.preferences is None:
        yield f"levels: {replaced}"
    if run.evaluation is not None:
        prompts, e = run.evaluation[0].prompts, config.evaluation
        note = prompt_note(model, prompts)
        yield (
            f"evaluation: {len(prompts)} samples of {len(set(prompts))} prompts of {e.prompts}, "
            f"every {e.every} iterations" + (note and f"; {note}")
        )


def _named(path: str) -> str:
    return "shapes" if Path(path) == SHIPPED / "pipeline" else path


def build_run(config: AlignConfig, base_dir: Path) -> Run:
    """Return the fixed parts of a run: algorithm, prompts, evaluation."""
    algorithm = build_algorithm(config.algorithm, own_schedule(config.model))
    sampler = GroupSampler(
        load_prompts(config.data.prompts, base_dir),
        groups=config.data.groups_per_iteration,
        group_size=algorithm.needs.group_size,
        seed=config.seed,
        task_weights=config.data.task_weights,
    )
    return Run(
        algorithm=algorithm,
        sampler=sampler,
        evaluation=_evaluation(config, base_dir) if config.evaluation.every else None,
        iterations=config.iterations,
        seed=config.seed,
        min_valid_fraction=config.min_valid_fraction,
        evaluates_ema=config.evaluation.weights == "ema",
    )


def _evaluation(config: AlignConfig, base_dir: Path) -> tuple[PromptBatch, SamplingPlan, int]:
    """Return the evaluation.

    It takes the model's own walk, whatever the algorithm rolls out with, as `flowalign evaluate` and an export do.
    """
    e, own = config.evaluation, own_schedule(config.model)
    plan = sampling_plan(e, schedule=own, path_family=config.model.family, inputs=config.model.inputs)
    return evaluation_batch(e.prompts, e.num_samples, base_dir), plan, e.seed


def _states(config: AlignConfig, saved: checkpoint.Checkpoint, made: MadeOf) -> list[dict[str, Any]]:
    if saved.state["base_hash"] != made.base_hash() and not made.has_accepted("model.path"):
        raise checkpoint.CheckpointError(
            f"{saved.path} was trained from another base model than {config.model.path}; "
            "set model.path to the original, or give this run another name"
        )
    learner, version = config.learner, int(saved.state["version"])
    target = {"engine": learner.engine, "zero_stage": learner.zero_stage, "world_size": learner.ranks}
    return [
        {"model": saved.model, "ema": saved.ema, "optimizer": optimizer, "version": version}
        for optimizer in states_for(saved.optimizer_by_rank, target)
    ]
