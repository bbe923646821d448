"""Bytes that the parts of a run need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from flowalign.algorithm import Needs
from flowalign.config.alignment import AlignConfig
from flowalign.config.sections import LoraConfig, ModelConfig
from flowalign.models.directory import open_directory
from flowalign.models.inspect import ModelSizes
from flowalign.plan.geometry import Geometry
from flowalign.plan.offloaded import offloaded_bytes

# Bytes a token and layer keep for the backward pass, in units of width × element size
# (arXiv:2205.05198, eq. 1, without the attention scores, which fused attention never stores).
_KEPT_PER_TOKEN = {
    "none": 34,
    "selective": 11,  # queries, keys, values, attention and its projection, a feed-forward layer's 4 + 1, the input
    "blocks": 1,  # the input
}
_KEPT_FORWARD = 8
_ADAM_MOMENTS = 8
_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Memory:
    """Bytes; ``activations`` are rough, within a factor of two.

    ``text_encoders`` are in ``rollout_weights`` where rollout workers keep them, and otherwise in no other number: a
    process of their own encodes what is not among the ``embeddings``, the most bytes of those on disk.

    ``teachers``, by name, are each in an actor of its own or, with ``teachers_in_learner``, all in every learner rank.
    ``learner_offloaded`` are those of a rank's parts that ``learner.offload`` keeps off its device.
    """

    rollout_weights: int
    rollout_activations: int
    learner_weights: int
    learner_gradients: int
    learner_optimizer: int
    learner_ema: int
    learner_reference: int
    learner_activations: int
    trajectories: int
    teachers: dict[str, int]
    teachers_in_learner: bool
    text_encoders: int = 0
    keeps_text_encoders: bool = True
    embeddings: int = 0
    learner_offloaded: int = 0

    @property
    def rollout_worker(self) -> int:
        return self.rollout_weights + self.rollout_activations

    @property
    def learner_rank(self) -> int:
        weights = self.learner_weights + self.learner_gradients + self.learner_optimizer
        inside = sum(self.teachers.values()) if self.teachers_in_learner else 0
        held = weights + self.learner_ema + self.learner_reference + inside + self.learner_activations
        return held - self.learner_offloaded


def plan_memory(
    config: AlignConfig,
    needs: Needs,
    geometry: Geometry,
    sizes: ModelSizes,
    teachers: Mapping[str, ModelSizes],
    num_texts: int = 0,
) -> Memory:
    """Return the bytes of a rollout worker, of a learner rank and of each teacher.

    What could be trained is float32 everywhere. ``num_texts`` are those whose embeddings are kept on disk.

    ``teachers`` are the sizes of those that are pipelines; all others are runs of the model, and of its size.
    """
    element, learner = _BYTES[config.model.dtype], config.learner
    text = sum(count for part, count in sizes.frozen.items() if part.startswith("text_encoder")) * element
    others = sum(sizes.frozen.values()) * element - (0 if config.rollout.keeps_text_encoders else text)
    lora = config.model.lora is not None
    trainable = sizes.trainable * 4
    stored = _stored(config.model, element)
    # Beside its blocks a base is as it is loaded, which is float32 where that is asked for.
    base = sizes.blocks * stored + (sizes.transformer - sizes.blocks) * max(stored, element) if lora else 0
    # Weights that are stored smaller than they were loaded are in no shards.
    whole = sizes.blocks * stored if lora and stored < element else 0
    trained = needs.trained
    sharded = 3 if learner.engine == "fsdp" else learner.zero_stage
    shards = [learner.ranks if sharded >= stage else 1 for stage in (1, 2, 3)]
    guided = 2 if 0 < 2 * geometry.images * geometry.num_steps <= geometry.rollout_passes else 1
    token = sizes.width * element * sizes.num_layers * (sizes.image_tokens + sizes.text_tokens)
    micro = min(geometry.micro_batch_size, geometry.transitions_per_step) * guided
    kept, all_kept = _KEPT_PER_TOKEN[learner.activation_checkpointing], _KEPT_PER_TOKEN["none"]
    anew = 0 if kept == all_kept else all_kept // sizes.num_layers + 1  # of the one block that is at work
    latent = math.prod(sizes.latent_shape) * 4
    chunk = min(geometry.chunk_size, geometry.images) * guided
    moments = sizes.trainable * _ADAM_MOMENTS // shards[0] * trained
    average = trainable // shards[0] if learner.ema_decay is not None else 0
    reference = _reference(needs, config.model.lora, base + trainable, trainable)
    taught = {name: teachers[name].transformer * 4 if name in teachers else base + trainable for name in needs.teachers}
    blocks = sizes.blocks * (stored if lora else 4)
    frozen = [blocks * trained if lora and sharded < 3 else 0, blocks if reference > (trainable if lora else 0) else 0]
    if not config.cluster.has_teacher_actors:
        frozen += [teachers[name].blocks * 4 if name in teachers else blocks for name in needs.teachers]
    return Memory(
        rollout_weights=others + base + trainable,
        # Without gradients one layer's activations are alive at a time.
        rollout_activations=_KEPT_FORWARD * token // sizes.num_layers * chunk,
        learner_weights=((base + trainable - whole) // shards[2] + whole) * trained,
        learner_gradients=trainable // shards[1] * trained,
        learner_optimizer=moments,
        learner_ema=average,
        learner_reference=reference,
        learner_activations=(kept + anew) * token * micro,
        trajectories=geometry.images * (geometry.window_steps + 2) * latent,
        teachers=taught,
        teachers_in_learner=not config.cluster.has_teacher_actors,
        text_encoders=text,
        keeps_text_encoders=config.rollout.keeps_text_encoders,
        embeddings=num_texts * _embedding(config.model, element),
        learner_offloaded=offloaded_bytes(
            learner, config.device, sizes.num_layers, moments=moments, averages=average, frozen=frozen
        ),
    )


def _stored(model: ModelConfig, element: int) -> int:
    """Return the bytes of a weight in the blocks of a LoRA's frozen base."""
    return element if model.base_dtype is None else _BYTES[model.base_dtype]


def _embedding(model: ModelConfig, element: int) -> int:
    """Return the bytes of the longest text's rows; a mask takes one a token."""
    directory = open_directory(model)
    rows = directory.family.text_shapes(directory, model.max_sequence_length)
    return sum(math.prod(shape) * (1 if name == "mask" else element) for name, shape in rows.items())


def _reference(needs: Needs, lora: LoraConfig | None, network: int, trainable: int) -> int:
    """Return the bytes of a frozen copy of the network.

    Without its adapter a LoRA's network is its own, unless the reference moves; with the one that the run began from,
    the adapter alone is copied.
    """
    if needs.reference is None:
        return 0
    if lora is None or needs.reference.refresh is not None:
        return network
    return 0 if lora.path is None else trainable
