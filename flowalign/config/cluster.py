"""The sections that say where a run computes: threads, device, Ray's actors and patience with them."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field

from flowalign.config.fields import MayChange
from flowalign.config.section import ConfigError, Section
from flowalign.config.sections import Positive

CORES_PROMISED = 2
"""Actors of one machine take turns, so each of its cores may be promised so many times."""


def visible_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class PatienceConfig(Section):
    """The seconds that an actor may be silent over a chunk, a score, an update or a sync before it counts as frozen."""

    first_s: Annotated[float, Field(gt=0)] = 3600
    """Seconds to load, and for what was not done before in this run."""
    least_s: Annotated[float, Field(gt=0)] = 120
    """Least seconds for everything else."""
    factor: Annotated[float, Field(ge=1)] = 10
    """Multiple of the longest so far, for everything else."""


class ClusterConfig(Section):
    """The place where a run runs."""

    threads: Positive = 2
    """Torch threads. On a CPU they decide both speed and bits."""
    device: str = "cpu"
    """``cpu``, ``cuda`` or ``cuda:N``."""
    backend: Annotated[Literal["ray", "local"], MayChange()] = "ray"
    """``ray``, or ``local``: one process without Ray."""
    address: Annotated[str | None, MayChange()] = None
    """A running cluster, ``auto`` or ``host:port``; null: a Ray of the run's own, on this machine."""
    rollout_workers: Annotated[Positive, MayChange()] = 1
    """Rollout actors."""
    reward_workers: Annotated[Positive, MayChange()] = 1
    """Reward actors."""
    rollout_cpus: Annotated[float, Field(ge=0), MayChange()] = 1
    """CPUs of a rollout actor."""
    rollout_gpus: Annotated[float, Field(ge=0), MayChange()] = 0
    """GPUs of a rollout actor."""
    reward_cpus: Annotated[float, Field(ge=0), MayChange()] = 0.5
    """CPUs of a reward actor."""
    reward_gpus: Annotated[float, Field(ge=0), MayChange()] = 0
    """GPUs of a reward actor; with ``local`` any number above 0 lets the run's own device score."""
    learner_cpus: Annotated[float, Field(ge=0), MayChange()] = 0.5
    """CPUs of a learner rank."""
    learner_gpus: Annotated[float, Field(ge=0), MayChange()] = 0
    """GPUs of a learner rank."""
    teachers: Annotated[Literal["actor", "learner"], MayChange()] = "actor"
    """``actor``: each teacher once, in an actor that all learner ranks ask. ``learner``: all of them in every rank, as
    always with ``backend: local``.
    """
    teacher_cpus: Annotated[float, Field(ge=0), MayChange()] = 0.5
    """CPUs of a teacher's actor."""
    teacher_gpus: Annotated[float, Field(ge=0), MayChange()] = 0
    """GPUs of a teacher's actor."""
    reward_threads: Positive = 1
    """Torch threads of a reward actor."""
    reward_deadline_s: Annotated[float, Field(gt=0)] = 600
    """Seconds that the rewards of one chunk may take before the run ends."""
    max_task_retries: Annotated[int, Field(ge=0), MayChange()] = 3
    """Times that a chunk is made anew where its actor has died."""
    max_restarts: Annotated[int, Field(ge=0), MayChange()] = 3
    """Times in a row that the learner's actors start again from the last checkpoint where one of them has died; ten
    iterations beyond them begin a new row. 0 ends the run at the first death.
    """
    restart_wait_s: Annotated[float, Field(ge=0), MayChange()] = 2
    """Seconds before the first start in a row; each further one waits twice as long, 300 s at most."""
    patience: Annotated[PatienceConfig, MayChange()] = PatienceConfig()
    """Patience with silent actors."""

    @property
    def has_teacher_actors(self) -> bool:
        return self.backend == "ray" and self.teachers == "actor"

    def check_cores(self, ranks: int, teachers: int, *, makes_images: bool = True) -> None:
        """Raise ConfigError where the actors of a Ray of the run's own do not fit on this machine."""
        if self.backend != "ray" or self.address is not None:
            return
        cores = visible_cores()
        asked = {
            "cluster.rollout_cpus": self.rollout_workers * self.rollout_cpus * makes_images,
            "cluster.reward_cpus": self.reward_workers * self.reward_cpus * makes_images,
            "cluster.learner_cpus": ranks * self.learner_cpus,
            "cluster.teacher_cpus": teachers * self.teacher_cpus * self.has_teacher_actors,
        }
        if sum(asked.values()) > CORES_PROMISED * cores:
            raise ConfigError(
                max(asked, key=lambda name: asked[name]),
                f"all actors together need {sum(asked.values()):g} CPUs, this machine has {cores} cores, "
                f"and at most {CORES_PROMISED * cores} may be asked for; lower it or the number of actors",
            )
