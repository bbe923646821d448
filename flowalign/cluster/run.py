"""Drives a run: backend, resume, the loop, checkpoints, the report. What the CLI calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from flowalign import checkpoint
from flowalign.algorithm import build_algorithm
from flowalign.cluster.journal import RunJournal
from flowalign.collapse import stopped_by_alarm
from flowalign.config import AlignConfig
from flowalign.data.prompts import GroupSampler, evaluation_batch, load_prompts
from flowalign.loop import Run, align
from flowalign.models.inspect import scheduler_shift
from flowalign.resume import leave_behind, resume_from
from flowalign.sample import base_hash, sampling_spec
from flowalign.types import PromptBatch, RolloutSpec


def run_align(
    config: AlignConfig, base_dir: Path, console: Console, begin: Callable[[], object] = lambda: None
) -> Path:
    """Run (or resume) an alignment to its last iteration, or to where an alarm stops it; returns the run directory.

    ``begin`` is called once all that the run needs stands, before the run directory is written to.

    Raises:
        CheckpointError, ResumeRefused: the run directory cannot be continued.
        PlacementError, ScorerError, TooManyInvalid, SyncError, NonFiniteUpdate: see their modules.
    """
    run_dir = Path(config.runs_dir) / config.name
    resume, say = config.checkpoint.resume, partial(console.print, markup=False, soft_wrap=True)
    saved = resume_from(run_dir, resume, say)
    start = 0 if saved is None else int(saved.state["iteration"])
    if start >= config.iterations:
        console.print(f"{run_dir} has done all {start} iterations already; raise `iterations` to continue")
        return run_dir
    if saved is not None and stopped_by_alarm(run_dir, config.safety, start) is not None:
        return run_dir
    run = build_run(config, base_dir)
    backend = make_backend(config, base_dir)
    journal = None
    try:
        base = base_hash(Path(config.model.path))
        if saved is not None:
            backend.restore(_states(config, saved, base))
            console.print(f"resuming {run_dir} after iteration {start}")
        leave_behind(run_dir, resume, saved, say)
        begin()
        wall = 0.0 if saved is None else float(saved.state["wall_s"])
        journal = RunJournal(config, run_dir, console, start=start, wall_s=wall, base_hash=base)
        with journal.interruptible():
            align(run, backend, journal, start)
        if journal.interrupted:
            console.print(
                f"stopped; the same command continues it from {run_dir / 'checkpoints' / 'latest'}", soft_wrap=True
            )
    finally:
        if journal is not None:
            journal.close()
        backend.close()
    return run_dir


def make_backend(config: AlignConfig, base_dir: Path) -> Any:
    if config.cluster.backend == "local":
        from flowalign.cluster.local import LocalBackend

        return LocalBackend(config, base_dir)
    from flowalign.cluster.ray_backend import RayBackend

    return RayBackend(config, base_dir)


def build_run(config: AlignConfig, base_dir: Path) -> Run:
    """The fixed parts of a run: algorithm, prompts, evaluation."""
    algorithm = build_algorithm(config.algorithm)
    sampler = GroupSampler(
        load_prompts(config.data.prompts, base_dir),
        groups=config.data.groups_per_iteration,
        group_size=algorithm.config.group_size,
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


def _evaluation(config: AlignConfig, base_dir: Path) -> tuple[PromptBatch, RolloutSpec, int]:
    """The model's own shift, whatever the algorithm rolls out with: so sample `flowalign evaluate` and an export."""
    e = config.evaluation
    shift = scheduler_shift(Path(config.model.path)) or config.algorithm.get("shift") or 1.0
    spec = sampling_spec(e, shift=shift, family=config.model.family, inputs=config.model.inputs)
    return evaluation_batch(e.prompts, e.num_samples, base_dir), spec, e.seed


def _states(config: AlignConfig, saved: checkpoint.Checkpoint, base_hash: str) -> list[dict[str, Any]]:
    if saved.state["base_hash"] != base_hash:
        raise checkpoint.CheckpointError(
            f"{saved.path} was trained from another base model than {config.model.path}; "
            "set model.path to the original, or give this run another name"
        )
    return [
        {
            "model": saved.model,
            "ema": saved.ema,
            "optimizer": saved.optimizer_of(rank),
            "version": int(saved.state["version"]),
        }
        for rank in range(config.learner.ranks)
    ]
