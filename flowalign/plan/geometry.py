"""Counts of one iteration that follow from the configuration alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flowalign.algorithm import Algorithm, Needs
from flowalign.config.alignment import AlignConfig
from flowalign.config.run import RunConfig
from flowalign.config.sections import ModelConfig
from flowalign.config.teachers import TeacherConfig
from flowalign.config.training import PretrainConfig
from flowalign.flow.guidance import guidance_of, guides
from flowalign.flow.solvers import evaluations
from flowalign.models.checked import teacher_model
from flowalign.models.directory import network_inputs
from flowalign.types import Guidance


@dataclass(frozen=True)
class Geometry:
    """Counts of one iteration; ``passes`` are network evaluations of one sample.

    A transition is asked of one teacher, once: ``teacher_passes`` are those of all, guided where the dearest one is.

    Of a training on latents a transition is one of them; it has no groups, and the chunks are those of evaluations.
    """

    groups: int
    group_size: int
    images: int
    chunks: int
    chunk_size: int
    num_steps: int
    window_steps: int
    transitions: int
    optimizer_steps: int
    transitions_per_step: int
    micro_batches_per_step: int
    micro_batch_size: int
    rollout_passes: int
    learner_forward_passes: int
    learner_backward_passes: int
    teacher_passes: int
    evaluation_passes: int


def plan_geometry(config: RunConfig, algorithm: Algorithm) -> Geometry:
    """Return the counts that follow from the configuration and the algorithm's own sampling plan."""
    if isinstance(config, PretrainConfig):
        return _of_latents(config, algorithm)
    assert isinstance(config, AlignConfig)
    plan, needs, learner = algorithm.plan(0, config.seed), algorithm.needs, config.learner
    images, per_step = samples_of(config, algorithm)
    num_steps = 0 if plan is None else plan.num_steps
    window = 0 if plan is None else plan.noise.num_steps
    transitions = images * max(window, 1)
    inputs = network_inputs(config.model)
    guided = 1 if plan is None else _passes(plan.guidance, inputs)
    own = needs.update_guidance_scale
    update_guided = guided if plan is None or own is None else _passes(replace(plan.guidance, scale=own), inputs)
    items = transitions * learner.epochs * update_guided
    micro_batch_size = needs.whole(learner.micro_batch_size)
    micro_batches = math.ceil(per_step / micro_batch_size)
    return Geometry(
        groups=config.data.groups_per_iteration,
        group_size=needs.group_size,
        images=images,
        chunks=math.ceil(images / config.rollout.chunk_size),
        chunk_size=config.rollout.chunk_size,
        num_steps=num_steps,
        window_steps=window,
        transitions=transitions,
        optimizer_steps=learner.updates_per_iteration * learner.epochs,
        transitions_per_step=per_step,
        micro_batches_per_step=math.ceil(micro_batches / learner.ranks) * learner.ranks,
        micro_batch_size=micro_batch_size,
        rollout_passes=0 if plan is None else images * evaluations(plan.solver, num_steps) * guided,
        learner_forward_passes=items * (len(needs.roles) - len(needs.teachers) + needs.trained - 1),
        learner_backward_passes=items * needs.trained,
        teacher_passes=transitions
        * max((_teacher_passes(t, config.model) for t in needs.teachers.values()), default=0),
        evaluation_passes=_evaluation_passes(config, inputs),
    )


def samples_of(config: AlignConfig, algorithm: Algorithm) -> tuple[int, int]:
    """Return the images of an iteration, and the most transitions of one optimizer step."""
    plan = algorithm.plan(0, config.seed)
    images = config.data.groups_per_iteration * algorithm.needs.group_size
    transitions = images * max(1, 0 if plan is None else plan.noise.num_steps)
    return images, math.ceil(transitions / config.learner.updates_per_iteration)


def _of_latents(config: PretrainConfig, algorithm: Algorithm) -> Geometry:
    """Return the counts of a training on latents, each network of the loss being asked once of a latent."""
    learner, needs = config.learner, algorithm.needs
    micro_batch_size = min(config.passes.micro_batch_size, learner.batch_size)
    micro_batches = math.ceil(learner.batch_size / micro_batch_size)
    return Geometry(
        groups=0,
        group_size=1,
        images=0,
        chunks=math.ceil(config.evaluation.num_samples / config.rollout.chunk_size) if config.makes_images else 0,
        chunk_size=config.rollout.chunk_size if config.makes_images else 0,
        num_steps=0,
        window_steps=0,
        transitions=learner.batch_size,
        optimizer_steps=1,
        transitions_per_step=learner.batch_size,
        micro_batches_per_step=math.ceil(micro_batches / learner.ranks) * learner.ranks,
        micro_batch_size=micro_batch_size,
        rollout_passes=0,
        learner_forward_passes=learner.batch_size * (len(needs.roles) - needs.teacher),
        learner_backward_passes=learner.batch_size,
        teacher_passes=learner.batch_size * needs.teacher,
        evaluation_passes=_evaluation_passes(config, network_inputs(config.model)),
    )


def _evaluation_passes(config: RunConfig, inputs: Sequence[str]) -> int:
    own = config.evaluation
    if not own.every:
        return 0
    return own.num_samples * evaluations(own.solver, own.num_steps) * _passes(guidance_of(own), inputs)


def _passes(guidance: Guidance, inputs: Sequence[str]) -> int:
    """Return the evaluations for one velocity: a network that takes the scale has a second for its true one alone."""
    return 2 if guides(guidance.true_scale if "guidance" in inputs else guidance.scale) else 1


def _teacher_passes(teacher: TeacherConfig, student: ModelConfig) -> int:
    """Return the evaluations of a teacher."""
    return _passes(guidance_of(teacher), network_inputs(teacher_model(teacher, student)))


def with_micro_batches(geometry: Geometry, needs: Needs, size: int, ranks: int) -> Geometry:
    """Return the same counts with micro-batches of at most ``size`` samples, whole items in each."""
    size = needs.whole(size)
    micro_batches = math.ceil(geometry.transitions_per_step / size)
    return replace(geometry, micro_batch_size=size, micro_batches_per_step=math.ceil(micro_batches / ranks) * ranks)
