"""Drives a run of any kind: backend, resume, the loop, checkpoints. What the commands call."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from flowalign.config.run import RunConfig
from flowalign.engine import process_group
from flowalign.record import checkpoint
from flowalign.record.checkpoint import Checkpoint
from flowalign.record.lock import RunLock
from flowalign.record.progress import PLAIN, Phases
from flowalign.record.stop import EndedEarly, StopRequest
from flowalign.run.attempts import Attempts
from flowalign.run.fixed import lines_on_model
from flowalign.run.journal import CURRICULUM
from flowalign.run.local import LocalBackend
from flowalign.run.loop import iterate
from flowalign.run.made import Accepted, MadeOf
from flowalign.run.prepared import prepare
from flowalign.run.protocols import Backend
from flowalign.run.ranks import Rank, SharedJournal, same_on_all
from flowalign.run.resume import leave_behind
from flowalign.run.second import states_for

Say = Callable[[str], None]
MakeBackend = Callable[[RunConfig, Path, Say, MadeOf | None, Rank], Backend]


def local_backend(config: RunConfig, base_dir: Path, say: Say, made: MadeOf | None, rank: Rank) -> LocalBackend:
    """Make the backend of this process, alone or among those that torchrun has started.

    Raises:
        ValueError: ``config`` asks for Ray, whose backend must be handed over.
    """
    if config.cluster.backend != "local":
        raise ValueError(f"cluster.backend: {config.cluster.backend} needs flowalign.cluster.ray_backend.RayBackend")
    return LocalBackend(config, base_dir, say, rank)


def drive(
    config: RunConfig,
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
    """Run (or resume) to the last iteration, or to where an alarm stops it; returns the run directory.

    ``begin`` is called once all that the run needs stands, before the run directory is written to (but for its lock).
    ``phases``, begun by the caller, is told when work begins and when it ends. Without ``lock`` and ``stop`` it holds
    the directory and listens for signals by itself; of several processes the first holds it. ``accepted`` names what
    may have changed since a checkpoint, and is told of what has. ``backend`` makes what rolls out, scores and learns:
    for ``cluster.backend: ray`` it is ``flowalign.cluster.ray_backend.RayBackend``.

    Raises:
        ConfigError: what the run is made of has changed since its checkpoint, or while it was started.
        EndedEarly: somebody asked for the end; what was learned is in the last checkpoint.
        RunDirectoryError, LockLost: another process holds the run directory, or took it over.
        CheckpointError, ResumeRefused: the run directory cannot be continued.
        NonFiniteUpdate, DestroyedState: an update leads nowhere; the weights before it are in the last checkpoint.
        RankLost: ranks of the learner were lost too often, or twice alike in one iteration.
        OtherRankFailed: another process of this run could not go on, and says why.
        PlacementError, ScorerError, TooManyInvalid, SyncError, LatentsError, ModelError: see their modules.
    """
    rank = Rank.of_environment() if config.command != "align" else Rank()
    run_dir = Path(config.runs_dir) / config.name
    with ExitStack() as stack:
        stop = stop or stack.enter_context(StopRequest(alone=rank.alone).on_signals())
        if lock is None and not rank.index:
            lock = stack.enter_context(RunLock.take(run_dir))
            stack.enter_context(stop.watching(lock))
        if lock is None:
            console = Console(quiet=True)
        driver = _Driver(config.on(rank.device(config.device)), base_dir, console, begin, rank, lock, stop, accepted)
        stack.callback(driver.close)
        driver.run(phases or Phases(), backend)
    return run_dir


class _Driver:
    """The steps of a run in one process: the first, which keeps the run directory, or another rank's."""

    def __init__(
        self,
        config: RunConfig,
        base_dir: Path,
        console: Console,
        begin: Callable[[], object],
        rank: Rank,
        lock: RunLock | None,
        stop: StopRequest,
        accepted: Accepted | None,
    ) -> None:
        self._config, self._base_dir, self._console, self._begin = config, base_dir, console, begin
        self._rank, self._lock, self._stop, self._accepted = rank, lock, stop, accepted
        self._say = partial(console.print, **PLAIN)
        self._run_dir = Path(config.runs_dir) / config.name
        self._made: MadeOf | None = None

    def run(self, phases: Phases, make_backend: MakeBackend) -> None:
        config = self._config
        given = {"accepted": self._accepted, "rank": self._rank, "holds": self._lock is not None}
        if (prepared := prepare(config, self._base_dir, self._say, **given)) is None:
            return
        saved, run, self._made = prepared.saved, prepared.run, prepared.made
        loading = time.monotonic()
        backend = make_backend(config, self._base_dir, self._say, self._made, self._rank)
        self._stop.meet()

        def restore(goal: Checkpoint | None) -> None:
            run.sampler.restore({} if goal is None else goal.state.get(CURRICULUM, {}))
            if goal is not None and (line := backend.restore(self._states(goal))) is not None:
                self._say(line)

        attempts: Attempts | None = None
        if self._made is not None and self._lock is not None:
            kept = {"made": self._made, "lock": self._lock, "stop": self._stop, "alone": self._rank.alone}
            attempts = Attempts(config, backend, restore, console=self._console, **kept)
        try:
            for line in lines_on_model(config, *backend.parameters(), seconds=time.monotonic() - loading):
                self._say(line)
            saved = same_on_all(self._run_dir, self._rank, saved)
            with process_group.failing_together():
                if saved is not None and self._made is not None:
                    self._made.refuse_changes(saved, self._say)
            if saved is not None:
                restore(saved)
                self._say(f"resuming {self._run_dir} after iteration {saved.step}")
            if not self._rank.alone and process_group.agreed(self._stop.asked):
                raise EndedEarly
            with process_group.failing_together():
                if self._made is not None:
                    self._made.check_steady()
                    leave_behind(self._run_dir, config.checkpoint.resume, saved, self._say)
                    self._begin()
            phases.begin("work")
            start, wall_s = (0, 0.0) if saved is None else (saved.step, float(saved.state.get("wall_s", 0.0)))
            if attempts is not None:
                done = attempts.run(run, start, wall_s)
            else:
                done = iterate(run, backend, SharedJournal(config, None, self._stop), start)
        finally:
            phases.begin("end")
            if attempts is not None:
                attempts.close()
            backend.close()
            self.close()
        if done < config.total and not (attempts is not None and attempts.stopped):
            raise EndedEarly

    def _states(self, saved: Checkpoint) -> list[dict[str, Any]]:
        """Return what each rank of the learner goes on from."""
        made, learner = self._made, self._config.learner
        if made is not None and self._config.command == "align" and not made.has_accepted("model.path"):
            if saved.state["base_hash"] != made.base_hash():
                raise checkpoint.CheckpointError(
                    f"{saved.path} was trained from another base model than {self._config.model.path}; "
                    "set model.path to the original, or give this run another name"
                )
        ranks = learner.ranks if self._rank.alone else self._rank.world_size
        target = {"engine": learner.engine, "zero_stage": learner.zero_stage, "world_size": ranks}
        held = {"model": saved.model, "ema": saved.ema, "averages": saved.averages}
        version = int(saved.state.get("version", saved.step))
        return [
            {**held, "optimizer": optimizer, "version": version}
            for optimizer in states_for(saved.optimizer_by_rank, target)
        ]

    def close(self) -> None:
        if self._made is not None:
            self._made.close()
