"""What a run would do and need, from its configuration alone: geometry, parameters, FLOPs, memory. Starts nothing."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowalign.algorithm import build_algorithm
from flowalign.config import AlignConfig
from flowalign.models.inspect import SD35_SHIFT, ModelSizes, default_lora_targets, inspect_model

GIB = 2**30
# Bytes a token and layer keep for the backward pass, in units of width × element size
# (arXiv:2205.05198, eq. 1, without the attention scores, which fused attention never stores).
_KEPT_PER_TOKEN = 34
_KEPT_FORWARD = 8
_ADAM_MOMENTS = 8
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Geometry:
    """Counts of one iteration; ``passes`` are network evaluations of one sample."""

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
    evaluation_passes: int


@dataclass(frozen=True)
class Memory:
    """Bytes; ``activations`` are rough, within a factor of two."""

    rollout_weights: int
    rollout_activations: int
    learner_weights: int
    learner_gradients: int
    learner_optimizer: int
    learner_ema: int
    learner_activations: int
    trajectories: int

    @property
    def rollout_worker(self) -> int:
        return self.rollout_weights + self.rollout_activations

    @property
    def learner_rank(self) -> int:
        weights = self.learner_weights + self.learner_gradients + self.learner_optimizer
        return weights + self.learner_ema + self.learner_activations


@dataclass(frozen=True)
class Plan:
    """The whole estimate; ``notes`` say what was assumed or looks odd."""

    geometry: Geometry
    model: ModelSizes
    rollout_flops: int
    learner_flops: int
    memory: Memory
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        own = asdict(self)
        own["memory"] |= {"rollout_worker": self.memory.rollout_worker, "learner_rank": self.memory.learner_rank}
        return own | {"iteration_flops": self.rollout_flops + self.learner_flops}


def make_plan(config: AlignConfig, missing: tuple[str, ...] = ()) -> Plan:
    """Count and estimate; where the model directory is absent, Stable Diffusion 3.5 medium stands in.

    ``missing`` are sentences about what this machine lacks. Raises ModelError for a directory that is
    there but cannot be read.
    """
    notes = [f"not ready on this machine: {sentence}" for sentence in missing]
    directory = Path(config.model.path)
    if not directory.exists():
        notes.append(f"{directory} is absent: sizes are those of Stable Diffusion 3.5 medium")
        if config.algorithm.get("shift", 0) is None:
            config = config.model_copy(update={"algorithm": {**config.algorithm, "shift": SD35_SHIFT}})
    algorithm = build_algorithm(config.algorithm)
    geometry = plan_geometry(config, algorithm)
    lora = config.model.lora
    sizes = inspect_model(
        directory,
        max_sequence_length=config.model.max_sequence_length,
        height=config.model.height,
        width=config.model.width,
        lora_rank=None if lora is None else lora.rank,
        lora_targets=() if lora is None else lora.targets or default_lora_targets(config.model.type),
    )
    # Gradients of activations cost a forward pass, gradients of weights another; a LoRA's own are negligible.
    backward = 2 if lora is None else 1
    learner_flops = (geometry.learner_forward_passes + backward * geometry.learner_backward_passes) * sizes.flops
    memory = plan_memory(config, algorithm, geometry, sizes)
    return Plan(
        geometry, sizes, geometry.rollout_passes * sizes.flops, learner_flops, memory, (*notes, *_odd(config, geometry))
    )


def plan_geometry(config: AlignConfig, algorithm: Any) -> Geometry:
    """Counts that follow from the configuration and the algorithm's own rollout plan."""
    spec = algorithm.rollout_plan(0, config.seed)
    group_size = int(getattr(algorithm.config, "group_size", 1))
    images = config.data.groups_per_iteration * group_size
    num_steps = 0 if spec is None else spec.num_steps
    window = 0 if spec is None else spec.window[1] - spec.window[0]
    transitions = images * max(window, 1)
    learner = config.learner
    per_step = math.ceil(transitions / learner.updates_per_iteration)
    guided = 1 if spec is None or spec.guidance_scale == 1 else 2
    update_guided = guided if getattr(algorithm.config, "guidance_in_update", True) else 1
    items = transitions * learner.epochs * update_guided
    evaluation = config.evaluation
    micro_batches = math.ceil(per_step / learner.micro_batch_size)
    return Geometry(
        groups=config.data.groups_per_iteration,
        group_size=group_size,
        images=images,
        chunks=math.ceil(images / config.rollout.chunk_size),
        chunk_size=config.rollout.chunk_size,
        num_steps=num_steps,
        window_steps=window,
        transitions=transitions,
        optimizer_steps=learner.updates_per_iteration * learner.epochs,
        transitions_per_step=per_step,
        micro_batches_per_step=math.ceil(micro_batches / learner.ranks) * learner.ranks,
        micro_batch_size=learner.micro_batch_size,
        rollout_passes=images * num_steps * guided,
        learner_forward_passes=items * len(algorithm.models),
        learner_backward_passes=items,
        evaluation_passes=evaluation.num_samples * evaluation.num_steps * (1 if evaluation.guidance_scale == 1 else 2)
        if evaluation.every
        else 0,
    )


def plan_memory(config: AlignConfig, algorithm: Any, geometry: Geometry, sizes: ModelSizes) -> Memory:
    """Bytes of a rollout worker and of a learner rank; trainable weights, gradients and moments are float32."""
    element, learner = _BYTES[config.model.dtype], config.learner
    others = sum(sizes.frozen.values()) * element
    lora = config.model.lora is not None
    trainable = sizes.trainable * 4
    base = sizes.transformer * element if lora else 0
    copies = 1 if not lora and "reference" in algorithm.models else 0
    shards = [learner.ranks if learner.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    guided = 2 if geometry.rollout_passes > geometry.images * geometry.num_steps else 1
    token = sizes.width * element * sizes.num_layers * (sizes.image_tokens + sizes.text_tokens)
    micro = min(geometry.micro_batch_size, geometry.transitions_per_step) * guided
    latent = math.prod(sizes.latent_shape) * 4
    chunk = min(geometry.chunk_size, geometry.images) * guided
    return Memory(
        rollout_weights=others + (base + trainable if lora else sizes.transformer * element),
        # Without gradients one layer's activations are alive at a time.
        rollout_activations=_KEPT_FORWARD * token // sizes.num_layers * chunk,
        learner_weights=others + base + trainable // shards[2] + copies * sizes.transformer * element,
        learner_gradients=trainable // shards[1],
        learner_optimizer=sizes.trainable * _ADAM_MOMENTS // shards[0],
        learner_ema=trainable if learner.ema_decay is not None else 0,
        learner_activations=_KEPT_PER_TOKEN * token * micro,
        trajectories=geometry.images * (geometry.window_steps + 2) * latent,
    )


def _odd(config: AlignConfig, geometry: Geometry) -> list[str]:
    notes = []
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
        notes.append(f"{geometry.chunks} chunks for {config.cluster.rollout_workers} rollout workers: some stay idle")
    return notes


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """The plan for people: label and value."""
    g, m, memory = plan.geometry, plan.model, plan.memory
    frozen = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in m.frozen.items())
    return [
        ("images", f"{g.images} = {g.groups} groups of {g.group_size}, in {g.chunks} chunks of {g.chunk_size}"),
        ("trajectory", f"{g.num_steps} steps, {g.window_steps} of them stochastic"),
        ("transitions", f"{g.transitions}"),
        (
            "update",
            f"{g.optimizer_steps} optimizer steps, each {g.transitions_per_step} transitions "
            f"in {g.micro_batches_per_step} micro-batches of {g.micro_batch_size}",
        ),
        ("sizes from", m.source),
        ("transformer", f"{m.transformer:,} parameters, {m.trainable:,} of them trained"),
        ("frozen", frozen or "no configuration found"),
        ("latents", f"{'x'.join(map(str, m.latent_shape))}, {m.image_tokens} image and {m.text_tokens} text tokens"),
        ("one forward", f"{m.flops / 1e9:,.2f} GFLOP a sample"),
        ("rollout", f"{plan.rollout_flops / 1e12:,.2f} TFLOP an iteration"),
        ("learner", f"{plan.learner_flops / 1e12:,.2f} TFLOP an iteration"),
        ("evaluation", f"{g.evaluation_passes * m.flops / 1e12:,.2f} TFLOP each"),
        ("rollout worker", f"{_size(memory.rollout_worker)}, {_size(memory.rollout_weights)} of it weights"),
        (
            "learner rank",
            f"{_size(memory.learner_rank)}: weights {_size(memory.learner_weights)}, "
            f"gradients {_size(memory.learner_gradients)}, optimizer {_size(memory.learner_optimizer)}, "
            f"EMA {_size(memory.learner_ema)}, activations about {_size(memory.learner_activations)}",
        ),
        ("trajectories", f"{_size(memory.trajectories)} an iteration"),
    ]


def _size(count: int) -> str:
    return f"{count / GIB:,.2f} GiB" if count >= GIB // 10 else f"{count / 2**20:,.1f} MiB"
