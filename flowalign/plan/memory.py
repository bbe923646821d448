"""Bytes that the parts of a run need, a small function for each term.

What could be trained is float32 everywhere, what is frozen as ``model.dtype`` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from flowalign.algorithm import Needs
from flowalign.config.run import RunConfig
from flowalign.config.sections import ModelConfig
from flowalign.models.directory import open_directory
from flowalign.models.inspect import ModelSizes
from flowalign.plan.geometry import Geometry
from flowalign.plan.offloaded import offloaded_bytes
from flowalign.plan.passes import Passes

FLOAT32 = 4
_ADAM_MOMENTS = 2
_BUCKET = 100_000_000  # numbers that ZeRO reduces at once, see engine/zero.py
_BYTES = {"float32": FLOAT32, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Memory:
    """Bytes at the most, by what holds them.

    A rollout worker holds network, autoencoder and text encoders, and beside them either what a pass holds or what the
    decoding of ``rollout.decode_batch_size`` images does. ``text_encoders`` are in it where ``keeps_text_encoders``;
    otherwise a process of their own encodes what is not among the ``embeddings``, the most bytes of those on disk.

    A learner's rank has weights, moments, averages and frozen networks all the time, and beside them gradients and
    activations: both at once where a step has several micro-batches, else the one as the other goes.
    ``learner_step`` is what the optimizer takes beside the gradients.

    ``teachers``, by name, are each in an actor of its own or, with ``teachers_in_learner``, all in every learner rank.
    ``learner_offloaded`` are those of a rank's parts that ``learner.offload`` keeps off its device.
    """

    rollout_network: int
    autoencoder: int
    text_encoders: int
    keeps_text_encoders: bool
    rollout_activations: int
    rollout_decoding: int
    learner_weights: int
    learner_gradients: int
    learner_optimizer: int
    learner_ema: int
    learner_reference: int
    learner_frozen: int
    learner_activations: int
    learner_step: int
    gradients_stay: bool
    trajectories: int
    teachers: dict[str, int]
    teachers_in_learner: bool
    embeddings: int = 0
    learner_offloaded: int = 0

    @property
    def rollout_weights(self) -> int:
        """What a rollout worker holds all the time."""
        return self.rollout_network + self.autoencoder + (self.text_encoders if self.keeps_text_encoders else 0)

    @property
    def rollout_working(self) -> int:
        """What it holds beside that, at the most."""
        return max(self.rollout_activations, self.rollout_decoding)

    @property
    def rollout_worker(self) -> int:
        return self.rollout_weights + self.rollout_working

    @property
    def learner_held(self) -> int:
        """What a learner's rank holds all the time, without what is offloaded."""
        own = self.learner_weights + self.learner_optimizer + self.learner_ema
        inside = sum(self.teachers.values()) if self.teachers_in_learner else 0
        return own + self.learner_reference + self.learner_frozen + inside - self.learner_offloaded

    @property
    def learner_working(self) -> int:
        """What it holds beside that, at the most."""
        update = self.learner_gradients + self.learner_step
        if self.gradients_stay:
            return max(update, self.learner_gradients + self.learner_activations)
        return max(update, self.learner_activations)

    @property
    def learner_rank(self) -> int:
        return self.learner_held + self.learner_working


@dataclass(frozen=True)
class Counted:
    """What the terms are made of."""

    config: RunConfig
    needs: Needs
    geometry: Geometry
    sizes: ModelSizes
    passes: Passes
    on_gpu: bool = False

    @property
    def element(self) -> int:
        """Bytes of a number that is not trained."""
        return _BYTES[self.config.model.dtype]

    @property
    def stored(self) -> int:
        """Bytes of a weight in the blocks of a LoRA's frozen base."""
        dtype = self.config.model.base_dtype
        return self.element if dtype is None else _BYTES[dtype]

    def shards(self, stage: int) -> int:
        """Return among how many ranks that is divided which ZeRO divides from ``stage`` on."""
        learner = self.config.learner
        sharded = 3 if learner.engine == "fsdp" else learner.zero_stage
        return learner.ranks if sharded >= stage else 1


def plan_memory(counted: Counted, teachers: Mapping[str, ModelSizes], num_texts: int = 0) -> Memory:
    """Return the bytes of a rollout worker, of a learner rank and of each teacher.

    ``num_texts`` are those whose embeddings are kept on disk. ``teachers`` are the sizes of those that are pipelines;
    all others are runs of the model, and of its size.
    """
    c, config = counted, counted.config
    rolls = config.makes_images
    return Memory(
        rollout_network=network(c) if rolls else 0,
        autoencoder=autoencoder(c) if rolls else 0,
        text_encoders=text_encoders(c),
        keeps_text_encoders=rolls and config.rollout.keeps_text_encoders,
        rollout_activations=rollout_activations(c) if rolls else 0,
        rollout_decoding=decoding(c) if rolls else 0,
        learner_weights=learner_weights(c),
        learner_gradients=gradients(c),
        learner_optimizer=optimizer(c),
        learner_ema=averages(c),
        learner_reference=reference(c),
        learner_frozen=frozen_beside(c, teachers.get("teacher")),
        learner_activations=learner_activations(c),
        learner_step=optimizer_step(c),
        gradients_stay=c.geometry.micro_batches_per_step > config.learner.ranks,
        trajectories=trajectories(c),
        teachers={
            name: teachers[name].transformer * FLOAT32 if name in teachers else network(c) for name in c.needs.teachers
        },
        teachers_in_learner=not config.cluster.has_teacher_actors,
        embeddings=num_texts * _embedding(config.model, c.element),
        learner_offloaded=offloaded(c, teachers),
    )


def frozen_base(c: Counted) -> int:
    """Bytes of the network that a LoRA lies on, its buffers included; 0 without a LoRA.

    Beside its blocks it is as it is loaded, which is float32 where that is asked for.
    """
    if c.config.model.lora is None:
        return 0
    beside = (c.sizes.transformer - c.sizes.blocks) * max(c.stored, c.element)
    return c.sizes.blocks * c.stored + beside + c.sizes.buffers * c.element


def unsharded_base(c: Counted) -> int:
    """Bytes of a base's blocks that are in no shards: those that are stored smaller than they were loaded."""
    return c.sizes.blocks * c.stored if c.config.model.lora is not None and c.stored < c.element else 0


def trained(c: Counted) -> int:
    """Bytes of what is trained, and of the buffers of a network that is trained whole."""
    return c.sizes.trainable * FLOAT32 + (c.sizes.buffers * c.element if c.config.model.lora is None else 0)


def network(c: Counted) -> int:
    """Bytes of a whole network."""
    return frozen_base(c) + trained(c)


def autoencoder(c: Counted) -> int:
    return sum(count for part, count in c.sizes.frozen.items() if not part.startswith("text_encoder")) * c.element


def text_encoders(c: Counted) -> int:
    return sum(count for part, count in c.sizes.frozen.items() if part.startswith("text_encoder")) * c.element


def rollout_activations(c: Counted) -> int:
    """Bytes of the pass of a chunk, filled up where it has fewer samples; a compiled network keeps what learns."""
    line = c.passes.learned if c.config.rollouts_compile else c.passes.rolled
    return line.at(c.geometry.chunk_size * c.geometry.rolled_rows)


def decoding(c: Counted) -> int:
    """Bytes of the decoding of the images that are decoded at once."""
    images = min(c.config.rollout.decode_batch_size, max(c.geometry.chunk_size, 1))
    return c.passes.decoded.at(images)


def learner_weights(c: Counted) -> int:
    """Bytes of the networks that learn; ZeRO has a second copy of what a rank steps."""
    whole = unsharded_base(c)
    own = (network(c) - whole) // c.shards(3) + whole
    if c.config.learner.zero_stage:
        own += c.sizes.trainable * FLOAT32 // c.shards(1)
    return own * c.needs.trained


def gradients(c: Counted) -> int:
    return c.sizes.trainable * FLOAT32 // c.shards(2) * c.needs.trained


def optimizer(c: Counted) -> int:
    """Bytes of AdamW's moments."""
    return c.sizes.trainable * FLOAT32 * _ADAM_MOMENTS // c.shards(1) * c.needs.trained


def optimizer_step(c: Counted) -> int:
    """Bytes that an update takes beside weights, gradients and moments: AdamW's denominators, which a GPU computes of
    all weights at once and a CPU one after the other, and ZeRO's bucket."""
    denominators = c.sizes.trainable * FLOAT32 // c.shards(1) if c.on_gpu else 0
    bucket = min(_BUCKET, c.sizes.trainable) * FLOAT32 if c.config.learner.zero_stage else 0
    return denominators + bucket


def averages(c: Counted) -> int:
    return c.sizes.trainable * FLOAT32 // c.shards(1) * len(c.config.learner.ema_decays)


def reference(c: Counted) -> int:
    """Bytes of a frozen copy of the network.

    Without its adapter a LoRA's network is its own, unless the reference moves; with the one that the run began from,
    the adapter alone is copied.
    """
    lora = c.config.model.lora
    if c.needs.reference is None:
        return 0
    if lora is None or c.needs.reference.refresh is not None:
        return network(c)
    return 0 if lora.path is None else c.sizes.trainable * FLOAT32


def frozen_beside(c: Counted, teacher: ModelSizes | None) -> int:
    """Bytes of what else lies frozen in a learner's rank: the teacher of a training on latents, the average as a
    network, and the autoencoder that pixels or features are made by."""
    own = (teacher.transformer + teacher.buffers) * FLOAT32 if teacher is not None and c.needs.teacher else 0
    own += network(c) if c.needs.average else 0
    return own + (autoencoder(c) if c.needs.decoder or c.needs.features else 0)


def offloaded(c: Counted, teachers: Mapping[str, ModelSizes]) -> int:
    """Bytes that ``learner.offload`` keeps off a rank's device: moments, averages, blocks of whole frozen networks."""
    learner, lora, needs = c.config.learner, c.config.model.lora, c.needs
    blocks = c.sizes.blocks * (FLOAT32 if lora is None else c.stored)
    divided = learner.engine == "fsdp" or learner.zero_stage == 3
    copied = reference(c) > (c.sizes.trainable * FLOAT32 if lora else 0)
    frozen = [blocks * needs.trained if lora and not divided else 0, blocks * copied, blocks * needs.average]
    if not c.config.cluster.has_teacher_actors:
        frozen += [teachers[name].blocks * FLOAT32 if name in teachers else blocks for name in needs.teachers]
    if needs.teacher and (teacher := teachers.get("teacher")) is not None:
        frozen.append(teacher.blocks * FLOAT32)
    own = {"moments": optimizer(c), "averages": averages(c), "frozen": frozen}
    return offloaded_bytes(learner, c.config.device, c.sizes.num_layers, **own)


def learner_activations(c: Counted) -> int:
    """Bytes that the forward and backward pass of a micro-batch holds, casts of weights by autocast included.

    A layer whose weights lie in shards is gathered for its pass, and the next one with it.
    """
    micro = min(c.geometry.micro_batch_size, c.geometry.transitions_per_step)
    gathered = 2 * network(c) // c.sizes.num_layers if c.shards(3) > 1 else 0
    return c.passes.learned.at(micro * c.geometry.learned_rows) + gathered


def trajectories(c: Counted) -> int:
    """Bytes of an iteration's states, in the memory of the machine."""
    return c.geometry.images * (c.geometry.window_steps + 2) * math.prod(c.sizes.latent_shape) * FLOAT32


def _embedding(model: ModelConfig, element: int) -> int:
    """Return the bytes of the longest text's rows; a mask takes one a token."""
    directory = open_directory(model)
    rows = directory.family.text_shapes(directory, model.max_sequence_length)
    return sum(math.prod(shape) * (1 if name == "mask" else element) for name, shape in rows.items())
