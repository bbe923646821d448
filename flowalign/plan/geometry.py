"""Counts of one iteration that follow from the configuration alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from flowalign.algorithm import Algorithm, Call, Needs, teacher_role
from flowalign.config.alignment import AlignConfig
from flowalign.config.run import RunConfig
from flowalign.config.sections import ModelConfig
from flowalign.config.training import PretrainConfig
from flowalign.flow.guidance import guidance_of, guides
from flowalign.flow.solvers import evaluations
from flowalign.flow.stretches import velocities
from flowalign.models.checked import teacher_model
from flowalign.models.directory import network_inputs
from flowalign.plan.updates import asked_of_items
from flowalign.types import Guidance, SamplingPlan


@dataclass(frozen=True)
class Geometry:
    """Counts of one iteration; ``passes`` are network evaluations of one sample, at the most.

    ``transitions`` are the samples of all items that are learned from: steps of walks, points, pairs, latents, or the
    images of whole groups. Rollouts make ``images`` walks, and ``decoded`` pictures of them. Passes of the learner are
    those of all ranks, and what fills its micro-batches up is among them: ``learner_forward_passes`` of its own
    network, those with a gradient included, ``derivative_passes`` those of them that come with a derivative.
    ``teacher_passes`` are those of frozen networks of another size; of several one is asked about an item, which is
    counted as the dearest. ``learned_rows`` and ``rolled_rows`` are the rows of a batch for one sample of a micro-batch
    and of a chunk, both passes of guidance included.

    Of a training on latents there are no groups, and the chunks are those of evaluations.
    """

    groups: int
    group_size: int
    images: int
    decoded: int
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
    rolled_rows: int
    learner_forward_passes: int
    learner_backward_passes: int
    derivative_passes: int
    learned_rows: int
    teacher_passes: int
    evaluation_passes: int


def plan_geometry(config: RunConfig, algorithm: Algorithm) -> Geometry:
    """Return the counts that follow from the configuration and what the algorithm says of itself."""
    if isinstance(config, PretrainConfig):
        return _of_latents(config, algorithm)
    assert isinstance(config, AlignConfig)
    plan, needs, learner = algorithm.plan(0, config.seed), algorithm.needs, config.learner
    images, per_step = samples_of(config, algorithm)
    transitions, micro_batch_size = algorithm.most_items(images), needs.whole(learner.micro_batch_size)
    micro_batches = math.ceil(per_step / micro_batch_size)
    rolled = 1 if plan is None else _guided(plan.guidance, config.model)
    return Geometry(
        groups=config.data.groups_per_iteration,
        group_size=needs.group_size,
        images=images,
        decoded=0 if plan is None else images * len(plan.branching.granularities),
        chunks=math.ceil(images / config.rollout.chunk_size),
        chunk_size=config.rollout.chunk_size,
        num_steps=0 if plan is None else plan.num_steps,
        window_steps=0 if plan is None else plan.noise.num_steps,
        transitions=transitions,
        optimizer_steps=learner.updates_per_iteration * learner.epochs,
        transitions_per_step=per_step,
        micro_batches_per_step=math.ceil(micro_batches / learner.ranks) * learner.ranks,
        micro_batch_size=micro_batch_size,
        rollout_passes=0 if plan is None else rolled * _walked(config, plan, images),
        rolled_rows=max(rolled, _evaluated_rows(config)),
        evaluation_passes=_evaluation_passes(config),
        **_learned(config, algorithm, transitions),
    )


def samples_of(config: AlignConfig, algorithm: Algorithm) -> tuple[int, int]:
    """Return the walks of an iteration, and the most samples of the items of one optimizer step."""
    images, item = config.data.groups_per_iteration * algorithm.needs.group_size, algorithm.needs.item_samples
    most = algorithm.most_items(images) // item
    return images, math.ceil(most / config.learner.updates_per_iteration) * item


def _walked(config: AlignConfig, plan: SamplingPlan, images: int) -> int:
    """Return the velocities of an iteration's walks: a prefix that a group shares is walked in each of its chunks."""
    before, own = velocities(plan)
    prefixes, size = images, config.rollout.chunk_size
    if plan.branching.shared_noise and plan.branching.shared_prefix:
        group = images // config.data.groups_per_iteration
        chunks = [(begin, min(begin + size, images)) for begin in range(0, images, size)]
        prefixes = sum(math.ceil(end / group) - begin // group for begin, end in chunks)
    return before * prefixes + own * images


def _learned(config: RunConfig, algorithm: Algorithm, samples: int) -> dict[str, int]:
    """Return what the calls of an algorithm come to, its items being of so many ``samples``."""
    calls, needs = algorithm.network_calls, algorithm.needs
    asked = asked_of_items(samples, needs, config.passes, config.learner.ranks)
    forward = backward = derivative = taught = shared = 0
    parts = ((asked.annotate, calls.annotate), (asked.loss, calls.loss), (asked.second_loss, calls.second_loss))
    for rows, part in parts:
        for call in part:
            made = round(rows * call.times) * _guided(call.guidance, _asked_model(config, needs, call))
            if call.role == "teacher":
                taught += made
            elif call.role.startswith("teacher:"):
                shared = max(shared, made)
            else:
                forward, backward = forward + made, backward + made * call.learns
                derivative += made * call.derivative
    kept = ([call for call in part if call.learns] for _, part in parts)
    rows = [sum(math.ceil(c.times) * _guided(c.guidance, config.model) for c in part) for part in kept]
    return {
        "learner_forward_passes": forward,
        "learner_backward_passes": backward,
        "derivative_passes": derivative,
        "learned_rows": max(1, *rows),
        "teacher_passes": taught + shared,
    }


def _asked_model(config: RunConfig, needs: Needs, call: Call) -> ModelConfig:
    if isinstance(config, PretrainConfig):
        return config.teacher if call.role == "teacher" and config.teacher is not None else config.model
    named = {teacher_role(name): teacher for name, teacher in needs.teachers.items()}.get(call.role)
    return config.model if named is None else teacher_model(named, config.model)


def _of_latents(config: PretrainConfig, algorithm: Algorithm) -> Geometry:
    """Return the counts of a training on latents."""
    learner = config.learner
    micro_batch_size = min(config.passes.micro_batch_size, learner.batch_size)
    micro_batches = math.ceil(learner.batch_size / micro_batch_size)
    return Geometry(
        groups=0,
        group_size=1,
        images=0,
        decoded=0,
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
        rolled_rows=_evaluated_rows(config),
        evaluation_passes=_evaluation_passes(config),
        **_learned(config, algorithm, learner.batch_size),
    )


def _evaluation_passes(config: RunConfig) -> int:
    own = config.evaluation
    if not own.every:
        return 0
    return own.num_samples * evaluations(own.solver, own.num_steps) * _evaluated_rows(config)


def _evaluated_rows(config: RunConfig) -> int:
    return _guided(guidance_of(config.evaluation), config.model) if config.evaluation.every else 1


def _guided(guidance: Guidance | None, model: ModelConfig) -> int:
    """Return the evaluations for one velocity: a network that takes the scale has a second for its true one alone."""
    if guidance is None:
        return 1
    return 2 if guides(guidance.true_scale if "guidance" in network_inputs(model) else guidance.scale) else 1


def with_micro_batches(geometry: Geometry, needs: Needs, size: int, ranks: int) -> Geometry:
    """Return the same counts with micro-batches of at most ``size`` samples, whole items in each."""
    size = needs.whole(size)
    micro_batches = math.ceil(geometry.transitions_per_step / size)
    return replace(geometry, micro_batch_size=size, micro_batches_per_step=math.ceil(micro_batches / ranks) * ranks)
