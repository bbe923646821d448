"""The plan of a run: geometry, parameters, FLOPs and memory, from its configuration alone. It starts nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowalign.algorithms import build_algorithm
from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.data.prompts import PromptsError
from flowalign.models.checked import teacher_model
from flowalign.models.directory import is_pipeline, open_directory
from flowalign.models.errors import ModelError
from flowalign.models.inspect import ModelSizes, inspect_model, own_schedule
from flowalign.plan.geometry import Geometry, plan_geometry
from flowalign.plan.memory import Memory, plan_memory
from flowalign.samples.texts import texts_of_run

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """The whole estimate; ``notes`` say what was assumed or looks odd.

    ``num_texts`` are the prompts and negative prompts whose embeddings the run keeps on disk.
    """

    geometry: Geometry
    model: ModelSizes
    rollout_flops: int
    learner_flops: int
    memory: Memory
    notes: tuple[str, ...]
    num_texts: int = 0

    def as_dict(self) -> dict[str, Any]:
        own = asdict(self)
        own["memory"] |= {"rollout_worker": self.memory.rollout_worker, "learner_rank": self.memory.learner_rank}
        return own | {"iteration_flops": self.rollout_flops + self.learner_flops}


def make_plan(config: AlignConfig, missing: tuple[str, ...] = ()) -> Plan:
    """Count and estimate; of an absent directory with the published name the built-in sizes of that model are taken.

    ``missing`` are sentences about what this machine lacks.

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
    algorithm = build_algorithm(config.algorithm, own_schedule(config.model))
    geometry = plan_geometry(config, algorithm)
    model = _largest(config)
    sizes, teachers = inspect_model(model), {}
    for name, teacher in algorithm.needs.teachers.items():
        if is_pipeline(Path(teacher.path)):
            teachers[name] = inspect_model(teacher_model(teacher, model))
    num_texts = 0
    if config.rollout_embeddings is not None:
        try:
            num_texts = len(texts_of_run(config, algorithm))
        except PromptsError as error:
            notes.append(f"the embeddings on disk are not counted: {error}")
    memory = plan_memory(config, algorithm.needs, geometry, sizes, teachers, num_texts)
    return Plan(
        geometry,
        sizes,
        geometry.rollout_passes * sizes.flops,
        _learner_flops(config, geometry, sizes, [sizes, *teachers.values()]),
        memory,
        (*notes, *_odd(config, geometry)),
        num_texts,
    )


def _largest(config: AlignConfig) -> ModelConfig:
    """Return the model at the largest of ``data.sizes``, or as it is where there are none."""
    if not config.data.sizes:
        return config.model
    height, width = max(config.data.image_sizes, key=math.prod)
    return config.model.model_copy(update={"height": height, "width": width})


def _learner_flops(config: AlignConfig, g: Geometry, model: ModelSizes, asked: Sequence[ModelSizes]) -> int:
    """Return the FLOPs of all ranks.

    Every one asks its own teachers, unless they are actors that answer all ranks at once.
    """
    # Gradients of activations cost a forward pass, gradients of weights another; a LoRA's own are negligible. Blocks
    # that are computed anew cost one more.
    backward = 2 if config.model.lora is None else 1
    backward += config.learner.activation_checkpointing == "blocks"
    teachers = g.teacher_passes * max(sizes.flops for sizes in asked)
    if not config.cluster.has_teacher_actors:
        teachers *= config.learner.ranks
    return (g.learner_forward_passes + backward * g.learner_backward_passes) * model.flops + teachers


def _odd(config: AlignConfig, geometry: Geometry) -> list[str]:
    notes = []
    if config.data.sizes:
        height, width = max(config.data.image_sizes, key=math.prod)
        notes.append(
            f"memory and FLOPs are those of {height}x{width}, the largest of data.sizes; a chunk and a micro-batch "
            "hold one size, so that there may be more of them"
        )
    if geometry.micro_batch_size > geometry.transitions_per_step:
        notes.append(
            f"learner.micro_batch_size {geometry.micro_batch_size} exceeds the {geometry.transitions_per_step} "
            "transitions of an optimizer step: each step is one micro-batch"
        )
    micro_batches = math.ceil(geometry.transitions_per_step / geometry.micro_batch_size)
    if micro_batches % config.learner.ranks:
        notes.append(
            f"{micro_batches} micro-batches a step over {config.learner.ranks} ranks: "
            f"{geometry.micro_batches_per_step - micro_batches} are padding"
        )
    if geometry.chunks < config.cluster.rollout_workers:
        notes.append(
            f"{_count(geometry.chunks, 'chunk')} for {config.cluster.rollout_workers} rollout workers: some stay idle"
        )
    return notes


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return the plan for people: label and value."""
    g, m, memory = plan.geometry, plan.model, plan.memory
    frozen = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in m.frozen.items())
    rows = [
        (
            "images",
            f"{g.images} = {_count(g.groups, 'group')} of {g.group_size}, "
            f"in {_count(g.chunks, 'chunk')} of {g.chunk_size}",
        ),
        ("trajectory", f"{_count(g.num_steps, 'step')}, {g.window_steps} of them stochastic"),
        ("transitions", f"{g.transitions}"),
        (
            "update",
            f"{_count(g.optimizer_steps, 'optimizer step')}, each {_count(g.transitions_per_step, 'transition')} "
            f"in {_count(g.micro_batches_per_step, 'micro-batch', 'es')} of {g.micro_batch_size}",
        ),
        ("sizes from", m.source),
        ("transformer", f"{m.transformer:,} parameters, {m.trainable:,} of them trained"),
        ("frozen", frozen or "no configuration found"),
        ("latents", f"{'x'.join(map(str, m.latent_shape))}, {m.image_tokens} image and {m.text_tokens} text tokens"),
        ("one forward", f"{_flops(m.flops)} a sample"),
        ("rollout", f"{_flops(plan.rollout_flops)} an iteration"),
        ("learner", f"{_flops(plan.learner_flops)} an iteration"),
        *([("evaluation", f"{_flops(g.evaluation_passes * m.flops)} each")] if g.evaluation_passes else []),
        ("rollout worker", f"{_size(memory.rollout_worker)}, {_size(memory.rollout_weights)} of it weights"),
        (
            "learner rank",
            f"{_size(memory.learner_rank)}: weights {_size(memory.learner_weights)}, "
            f"gradients {_size(memory.learner_gradients)}, optimizer {_size(memory.learner_optimizer)}, "
            f"EMA {_size(memory.learner_ema)}, reference {_size(memory.learner_reference)}, "
            f"activations about {_size(memory.learner_activations)}{_offloaded(memory)}",
        ),
        ("trajectories", f"{_size(memory.trajectories)} an iteration"),
        *([("embeddings", _embeddings(memory, plan.num_texts))] if plan.num_texts else []),
    ]
    if memory.teachers:
        where = "in every learner rank" if memory.teachers_in_learner else "each in an actor that all ranks ask"
        named = ", ".join(f"{name} {_size(count)}" for name, count in memory.teachers.items())
        rows.append(("teachers", f"{where}: {named}"))
    return rows


def _embeddings(memory: Memory, num_texts: int) -> str:
    kept = "in every rollout worker" if memory.keeps_text_encoders else "loaded apart, to encode what is missing"
    return (
        f"of {_count(num_texts, 'text')}, at most {_size(memory.embeddings)} on disk; "
        f"text encoders of {_size(memory.text_encoders)}, {kept}"
    )


def _offloaded(memory: Memory) -> str:
    away = memory.learner_offloaded
    return f"; {_size(away)} of these are kept off the device, and not counted" if away else ""


def _count(count: int, what: str, ending: str = "s") -> str:
    return f"{count} {what}{'' if count == 1 else ending}"


def _flops(count: int) -> str:
    """Write FLOPs in the largest unit of which there is one."""
    for unit, size in (("PFLOP", 10**15), ("TFLOP", 10**12), ("GFLOP", 10**9)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 10**6:,.2f} MFLOP"


def _size(count: int) -> str:
    return f"{count / GIB:,.2f} GiB" if count >= GIB // 10 else f"{count / 2**20:,.1f} MiB"
