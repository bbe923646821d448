"""What one configuration asks for: its geometry, its model's sizes, FLOPs of an iteration, and bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

from flowalign.algorithm import Algorithm
from flowalign.algorithms import build_algorithm
from flowalign.config.alignment import AlignConfig
from flowalign.config.run import RunConfig
from flowalign.config.sections import ModelConfig
from flowalign.config.training import PretrainConfig
from flowalign.models.checked import teacher_model
from flowalign.models.directory import is_pipeline, open_directory
from flowalign.models.inspect import ModelSizes, inspect_model, own_schedule
from flowalign.plan.geometry import Geometry, plan_geometry, with_micro_batches
from flowalign.plan.memory import Counted, Memory, plan_memory
from flowalign.plan.passes import NOTHING, passes_of


@dataclass(frozen=True)
class Estimate:
    """The counts of one configuration; FLOPs of an iteration are of all workers and ranks together."""

    config: RunConfig
    algorithm: Algorithm
    counted: Counted
    teachers: Mapping[str, ModelSizes]
    num_texts: int = 0

    @property
    def geometry(self) -> Geometry:
        return self.counted.geometry

    @property
    def sizes(self) -> ModelSizes:
        return self.counted.sizes

    @cached_property
    def memory(self) -> Memory:
        return plan_memory(self.counted, self.teachers, self.num_texts)

    @property
    def rollout_flops(self) -> int:
        """Those of the network's passes."""
        return self.geometry.rollout_passes * self.sizes.flops

    @property
    def decoding_flops(self) -> int:
        return self.geometry.decoded * self.counted.passes.decode_flops

    @property
    def evaluation_flops(self) -> int:
        """Those of one evaluation, its decoding included."""
        images = self.config.evaluation.num_samples if self.geometry.evaluation_passes else 0
        return self.geometry.evaluation_passes * self.sizes.flops + images * self.counted.passes.decode_flops

    @property
    def learner_flops(self) -> int:
        """Those of all ranks, and of their teachers wherever these are."""
        # Gradients of activations cost a forward pass, gradients of weights another; a LoRA's own are negligible.
        # Blocks that are computed anew cost one more.
        backward = 2 if self.config.model.lora is None else 1
        backward += self.config.learner.activation_checkpointing == "blocks"
        # A derivative along a direction costs as much as what it is the derivative of.
        g = self.geometry
        own = g.learner_forward_passes + g.derivative_passes + backward * g.learner_backward_passes
        return own * self.sizes.flops + self.teacher_flops

    @property
    def teacher_flops(self) -> int:
        """Those that frozen networks beside the policy answer a learner with, all as large as the largest."""
        return self.geometry.teacher_passes * max(sizes.flops for sizes in (self.teachers.values() or (self.sizes,)))

    def at(self, *, micro_batch_size: int | None = None, chunk_size: int | None = None) -> Estimate:
        """Return the same with another micro-batch, or with other chunks."""
        geometry = self.geometry
        if micro_batch_size is not None:
            geometry = with_micro_batches(geometry, self.algorithm.needs, micro_batch_size, self.config.learner.ranks)
        if chunk_size is not None:
            geometry = replace(geometry, chunk_size=chunk_size, chunks=math.ceil(geometry.images / chunk_size))
        return replace(self, counted=replace(self.counted, geometry=geometry))


def estimate(config: RunConfig, *, on_gpu: bool, passes: bool = True) -> Estimate:
    """Count what ``config`` asks for, on a GPU or on a CPU; without ``passes``, whose counting takes seconds, they hold
    nothing.

    Raises:
        ModelError: the small files of a model do not say what it is.
    """
    algorithm = build_algorithm(config.algorithm, own_schedule(config.model))
    model = largest(config)
    sizes, teachers = _sizes(model), {}
    for name, teacher in algorithm.needs.teachers.items():
        if is_pipeline(Path(teacher.path)):
            teachers[name] = _sizes(teacher_model(teacher, model))
    if isinstance(config, PretrainConfig) and config.teacher is not None:
        own = {name: getattr(model, name) for name in ("height", "width", "max_sequence_length")}
        teachers["teacher"] = _sizes(config.teacher.model_copy(update=own))
    held = passes_of(config, model, "gpu" if on_gpu else "cpu") if passes else NOTHING
    counted = Counted(config, algorithm.needs, plan_geometry(config, algorithm), sizes, held, on_gpu)
    return Estimate(config, algorithm, counted, teachers)


def largest(config: RunConfig) -> ModelConfig:
    """Return the model at the largest size of images and with the longest texts that the run has."""
    model = config.model
    if isinstance(config, AlignConfig) and config.data.sizes:
        height, width = max(config.data.image_sizes, key=math.prod)
        return model.model_copy(update={"height": height, "width": width})
    if isinstance(config, PretrainConfig) and config.stretches:
        drawn = [
            length for phase in config.stretches for length, weight in phase.max_sequence_lengths.items() if weight
        ]
        return model.model_copy(update={"max_sequence_length": max(drawn)})
    return model


def _sizes(model: ModelConfig) -> ModelSizes:
    directory = open_directory(model)
    parts = ("transformer", *(part for part in directory.family.encoder_parts if not part.startswith("tokenizer")))
    files = [
        dict(directory.config(part))
        for part in parts
        if directory.published is not None or (directory.path / part / "config.json").is_file()
    ]
    return _inspected(model.model_dump_json(), json.dumps(files, default=str))


@lru_cache(maxsize=64)
def _inspected(model: str, files: str) -> ModelSizes:
    return inspect_model(ModelConfig.model_validate_json(model))
