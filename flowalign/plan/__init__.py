"""The plan of a run: geometry, parameters, FLOPs, memory and disk, from its configuration alone. It starts nothing."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from flowalign.config.alignment import AlignConfig
from flowalign.config.run import RunConfig
from flowalign.config.section import ConfigError
from flowalign.data.banks.bank import LatentsError
from flowalign.data.prompts import PromptsError
from flowalign.models.directory import open_directory
from flowalign.models.errors import ModelError
from flowalign.models.inspect import ModelSizes
from flowalign.plan.answer import MFU, Answer, answer, as_dict
from flowalign.plan.devices import Gpus
from flowalign.plan.disk import Disk, plan_disk
from flowalign.plan.estimate import Estimate, estimate, largest
from flowalign.plan.geometry import Geometry, plan_geometry
from flowalign.plan.memory import Memory
from flowalign.plan.rows import count_text, item_text, plan_rows, plan_sections
from flowalign.samples.texts import texts_of_run

__all__ = ["Plan", "make_plan", "plan_geometry", "plan_rows", "plan_sections"]


@dataclass(frozen=True)
class Plan:
    """The whole estimate; ``notes`` say what was assumed or looks odd.

    ``num_texts`` are the prompts and negative prompts whose embeddings the run keeps on disk. ``answer`` is there where
    GPUs were given.
    """

    geometry: Geometry
    model: ModelSizes
    rollout_flops: int
    decoding_flops: int
    learner_flops: int
    evaluation_flops: int
    memory: Memory
    disk: Disk
    notes: tuple[str, ...]
    num_texts: int = 0
    answer: Answer | None = None

    def as_dict(self) -> dict[str, Any]:
        own = asdict(self)
        memory, disk = self.memory, self.disk
        own["memory"] |= {"rollout_worker": memory.rollout_worker, "learner_rank": memory.learner_rank}
        own["disk"] |= {"total": disk.total}
        own["answer"] = None if self.answer is None else as_dict(self.answer)
        return own | {"iteration_flops": self.rollout_flops + self.learner_flops}


def make_plan(config: RunConfig, missing: tuple[str, ...] = (), *, gpus: Gpus | None = None, mfu: float = MFU) -> Plan:
    """Count and estimate; of an absent directory with the published name the built-in sizes of that model are taken.

    ``missing`` are sentences about what this machine lacks. With ``gpus`` it is said whether the run fits on them, and
    how long it takes at a share ``mfu`` of their peak. Without them bytes are those on ``cluster.device``.

    Raises:
        ConfigError: there is no such directory. ModelError: it is there, and cannot be read.
    """
    notes = [f"not ready on this machine: {sentence}" for sentence in missing]
    try:
        published = open_directory(config.model).published
    except ModelError as error:
        raise ConfigError("model.path", str(error).removeprefix("model.path: ")) from error
    if published is not None:
        notes.append(f"{config.model.path} is absent: sizes are those of {published.source}")
    made = estimate(config, on_gpu=gpus is not None or config.device != "cpu")
    num_texts = 0
    if config.rollout_embeddings is not None:
        try:
            num_texts = len(texts_of_run(config, made.algorithm))
        except (PromptsError, LatentsError) as error:
            notes.append(f"the embeddings on disk are not counted: {error}")
    made = Estimate(made.config, made.algorithm, made.counted, made.teachers, num_texts)
    height, width = _pixels(config)
    return Plan(
        made.geometry,
        made.sizes,
        made.rollout_flops,
        made.decoding_flops,
        made.learner_flops,
        made.evaluation_flops,
        made.memory,
        plan_disk(config, made.sizes.trainable, height * width, made.memory.embeddings),
        (*notes, *_odd(made)),
        num_texts,
        None if gpus is None else answer(made, gpus, mfu),
    )


def _pixels(config: RunConfig) -> tuple[int, int]:
    """Return height and width of the largest images of the run."""
    directory, model = open_directory(config.model), largest(config)
    _, rows, columns = directory.latent_shape(model.height, model.width)
    return rows * directory.geometry.factor, columns * directory.geometry.factor


def _odd(made: Estimate) -> list[str]:
    config, geometry, notes = made.config, made.geometry, []
    if isinstance(config, AlignConfig) and config.data.sizes:
        height, width = max(config.data.image_sizes, key=math.prod)
        notes.append(
            f"memory and FLOPs are those of {height}x{width}, the largest of data.sizes; a chunk and a micro-batch "
            "hold one size, so that there may be more of them"
        )
    what = f"{item_text(geometry)}s"
    if geometry.micro_batch_size > geometry.transitions_per_step:
        notes.append(
            f"learner.micro_batch_size {geometry.micro_batch_size} exceeds the {geometry.transitions_per_step} "
            f"{what} of an optimizer step: each step is one micro-batch"
        )
    micro_batches = math.ceil(geometry.transitions_per_step / geometry.micro_batch_size)
    if micro_batches % config.learner.ranks:
        notes.append(
            f"{micro_batches} micro-batches a step over {config.learner.ranks} ranks: "
            f"{geometry.micro_batches_per_step - micro_batches} are padding"
        )
    if geometry.images and geometry.chunks < config.cluster.rollout_workers:
        notes.append(
            f"{count_text(geometry.chunks, 'chunk')} for {config.cluster.rollout_workers} rollout workers: "
            "some stay idle"
        )
    return notes + _not_counted(made)


def _not_counted(made: Estimate) -> list[str]:
    """Say what the numbers leave out of this run."""
    config, needs, notes = made.config, made.algorithm.needs, []
    if config.learner.compile == "auto":
        notes.append("learner.compile: auto is decided when the run begins, by its passes' seconds; here it is false")
    if config.learner.compiles:
        notes.append("learner.compile: activations are those of the plain network, and compiled ones are fewer")
    if needs.decoder or needs.features:
        notes.append("what a gradient through the autoencoder and beyond keeps is not counted")
    if not made.algorithm.says_calls:
        said = f"{config.algorithm['type']} does not say what its own losses ask (Algorithm.network_calls)"
        notes.append(f"{said}: the passes of its updates are a guess")
    if isinstance(config, AlignConfig) and config.data.refill:
        notes.append("what data.refill draws in the place of silent groups is not counted")
    return notes
