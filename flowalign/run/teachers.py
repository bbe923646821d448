"""The frozen networks of the roles ``teacher:<name>``: in each learner rank, or in an actor for all. Free of Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flowalign.algorithm import VelocityModel, teacher_role
from flowalign.algorithms import build_algorithm
from flowalign.config.alignment import AlignConfig
from flowalign.config.run import RunConfig
from flowalign.config.teachers import TeacherConfig
from flowalign.engine.accumulate import autocast
from flowalign.engine.frozen_blocks import offload_blocks
from flowalign.engine.offload import Offload
from flowalign.models.directory import is_pipeline
from flowalign.models.errors import ModelError
from flowalign.models.fingerprint import PRECISIONS, Encoders, encoders_of
from flowalign.models.guided import frozen
from flowalign.models.network import Network
from flowalign.record.checkpoint import CheckpointError
from flowalign.samples.opened import model_of, open_network, torch_threads
from flowalign.types import Condition


class Teacher(Protocol):
    """A teacher, here or in another process."""

    def latent_shape(self) -> tuple[int, int, int]: ...

    def encoders(self, precision: str) -> str | None:
        """Return the hash of the files that it encodes with, rounded so; None where they are the model's own."""
        ...

    @property
    def velocity(self) -> VelocityModel: ...


class LoadedTeacher:
    """A teacher in this process.

    Raises:
        ModelError: what lies at its path cannot be opened, or is no run of this model.
    """

    def __init__(self, config: AlignConfig, name: str, offload: Offload | None = None) -> None:
        wanted, model = teachers_of(config)[name], config.model
        try:
            network, _ = open_network(Path(wanted.path), config, wanted.weights)
        except CheckpointError as error:
            raise ModelError(
                f"algorithm.teachers.{name}: {error}. A teacher that is a run shares model.path and model.lora with "
                f"this one; make a pipeline of any other: flowalign export {wanted.path} --to DIR"
            ) from error
        network.module.requires_grad_(False).eval()
        offload_blocks(network.module, offload, config.device)
        self._shape, self.velocity = network.latent_shape(model.height, model.width), frozen(network)
        own = Path(wanted.path)
        self._encoders = encoders_of(model_of(own, config)) if is_pipeline(own) else None

    def latent_shape(self) -> tuple[int, int, int]:
        return self._shape

    def encoders(self, precision: str) -> str | None:
        return None if self._encoders is None else self._encoders(precision)


class SharedTeacher:
    """Answers requests of several ranks as the learner would itself: same threads, precision and geometry.

    ``computed`` counts them.
    """

    def __init__(self, config: AlignConfig, name: str) -> None:
        self.config, self.device = config, torch.device(config.cluster.device)
        with torch_threads(config.cluster.threads):
            self.teacher = LoadedTeacher(config, name)
        self.computed = 0

    def velocity(self, x: Tensor, t: Tensor, condition: Condition, options: Mapping[str, Any]) -> Tensor:
        """Ask the teacher; everything is on the CPU, the answer too."""
        self.computed += 1
        precision = autocast(self.device, self.config.model.dtype)
        with torch_threads(self.config.cluster.threads), precision:
            made = self.teacher.velocity(x.to(self.device), t.to(self.device), condition.to(self.device), **options)
        return made.cpu()


def ask(send: Callable[..., Tensor]) -> VelocityModel:
    """Return a velocity that is computed where ``send`` leads.

    Its tensors go there from the CPU, with the used prompts.
    """

    def velocity(x: Tensor, t: Tensor, condition: Condition, **options: Any) -> Tensor:
        return send(x.cpu(), t.cpu(), condition.used().to("cpu"), options).to(x.device)

    return velocity


def load_teachers(
    config: AlignConfig,
    wanted: Mapping[str, TeacherConfig],
    network: Network,
    shared: Mapping[str, Teacher] | None = None,
    *,
    compares: bool = True,
    offload: Offload | None = None,
) -> dict[str, VelocityModel]:
    """Load the networks of the teachers ``wanted``, by role: those of ``shared`` by name, all others here.

    ``compares`` reads the files of all encoders, which one rank does for all. ``offload`` says where the blocks of
    those that are loaded here are kept.

    Raises:
        ModelError: a teacher encodes prompts or images otherwise than the model.
    """
    found = {name: (shared or {}).get(name) or LoadedTeacher(config, name, offload) for name in wanted}
    shape, own = network.latent_shape(config.model.height, config.model.width), encoders_of(config.model)
    for name, teacher in found.items():
        key, path = f"algorithm.teachers.{name}", wanted[name].path
        if teacher.latent_shape() != shape:
            raise ModelError(f"{key}: {path} has latents of {teacher.latent_shape()}, the model's are {shape}")
        # It sees the student's states and prompt embeddings, so that both must mean the same to it.
        if compares and not _encodes_alike(teacher, own):
            raise ModelError(
                f"{key}: {path} encodes prompts or images otherwise than the model; a teacher needs the model's own "
                "text encoders and autoencoder"
            )
    return {teacher_role(name): teacher.velocity for name, teacher in found.items()}


def teachers_of(config: RunConfig) -> Mapping[str, TeacherConfig]:
    """Return the teachers that the run's algorithm learns from, by name."""
    return build_algorithm(config.algorithm).needs.teachers


def _encodes_alike(teacher: Teacher, own: Encoders) -> bool:
    return any(teacher.encoders(precision) in (None, own(precision)) for precision in PRECISIONS)
