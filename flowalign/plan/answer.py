"""What a plan answers of given GPUs: whether a run fits, by what it would, and how long it takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from flowalign.config.run import RunConfig
from flowalign.models.errors import ModelError
from flowalign.plan.devices import Gpus
from flowalign.plan.estimate import Estimate, estimate
from flowalign.plan.memory import Memory

USABLE = 0.92
"""Share of a GPU's memory that a plan gives away. The rest is for the driver's context, the libraries' workspaces and
what the allocator cannot use; an assumption that no GPU has confirmed."""
MFU = 0.3
"""Share of the peak that passes are taken to reach where nobody says it. Of the same peak Llama 3 was trained with 38
to 43 % (arXiv:2407.21783, table 4), with fused kernels and large batches; ours are eager and small."""
_WAYS = 3
_LORA_RANK = 32


@dataclass(frozen=True)
class Holder:
    """A process, or several alike: ``bytes`` of each at the most, and the ``room`` that its share of a GPU has."""

    name: str
    count: int
    share: float
    bytes: int
    room: int

    @property
    def fits(self) -> bool:
        return self.bytes <= self.room


@dataclass(frozen=True)
class Seconds:
    """Seconds of an iteration: rollouts with their decoding, the update, and the share of evaluations in it."""

    rollout: float
    decoding: float
    learner: float
    evaluation: float

    @property
    def iteration(self) -> float:
        return self.rollout + self.decoding + self.learner + self.evaluation


@dataclass(frozen=True)
class Way:
    """Overrides by which a run fits, and the largest micro-batch and chunk that then do."""

    overrides: tuple[str, ...]
    micro_batch_size: int
    chunk_size: int
    holders: tuple[Holder, ...]
    seconds: Seconds | None


@dataclass(frozen=True)
class Answer:
    """What is said of a run on ``gpus``, of which it needs ``needed``.

    ``micro_batch_size`` and ``chunk_size`` are the largest that fit as it is configured, 0 where not even one sample
    does. ``ways`` are there where it does not fit: the least change, and those with the largest sizes.
    """

    gpus: Gpus
    needed: float
    holders: tuple[Holder, ...]
    micro_batch_size: int
    chunk_size: int
    ways: tuple[Way, ...]
    mfu: float
    seconds: Seconds | None
    gpu_hours: float | None

    @property
    def fits(self) -> bool:
        return self.enough and all(holder.fits for holder in self.holders)

    @property
    def enough(self) -> bool:
        """There are as many GPUs as the run asks for."""
        return self.needed <= self.gpus.count


def answer(made: Estimate, gpus: Gpus, mfu: float = MFU, *, fixed: Collection[str] = ()) -> Answer:
    """Say whether the run of an estimate for GPUs fits on ``gpus``, and how long it takes at a share ``mfu`` of their
    peak. No way changes a key that is ``fixed``."""
    holders, needed = holders_of(made, gpus), needed_gpus(made)
    taken = seconds(made, gpus, mfu)
    hours = None if taken is None else taken.iteration * made.config.total * needed / 3600
    micro, chunk = largest_sizes(made, gpus)
    fits = needed <= gpus.count and all(holder.fits for holder in holders)
    ways = [] if fits else list(_ways(made, gpus, mfu, fixed))
    ways = ways if len(ways) <= _WAYS else [ways[0], *ways[1 - _WAYS :]]
    return Answer(gpus, needed, holders, micro, chunk, tuple(ways), mfu, taken, hours)


def needed_gpus(made: Estimate) -> float:
    """Return the number of GPUs that a run asks for, those of its rewards included."""
    cluster = made.config.cluster
    rewards = cluster.reward_workers * cluster.reward_gpus
    rewards *= cluster.backend == "ray" and made.config.makes_images
    return rewards + sum(count * share for _, count, share, _ in processes(made.config, made.memory))


def holders_of(made: Estimate, gpus: Gpus) -> tuple[Holder, ...]:
    """Return what the run lays on GPUs. An actor whose share is 0, as on a CPU, is given one whole GPU."""
    room = gpus.memory * USABLE
    return tuple(Holder(*held, int(min(held[2], 1.0) * room)) for held in processes(made.config, made.memory))


def processes(config: RunConfig, memory: Memory) -> list[tuple[str, int, float, int]]:
    """Return by name how many processes there are, the share of a GPU that each has, and the bytes of one."""
    cluster, ranks = config.cluster, config.learner.ranks
    if cluster.backend == "local":
        together = memory.rollout_weights + memory.learner_held + max(memory.rollout_working, memory.learner_working)
        return [("process", ranks, 1.0, together)]
    found = [("learner rank", ranks, cluster.learner_gpus or 1.0, memory.learner_rank)]
    if config.makes_images:
        own = ("rollout worker", cluster.rollout_workers, cluster.rollout_gpus or 1.0, memory.rollout_worker)
        found.insert(0, own)
    if memory.teachers and not memory.teachers_in_learner:
        held = max(memory.teachers.values()) + memory.rollout_activations
        found.append(("teacher", len(memory.teachers), cluster.teacher_gpus or 1.0, held))
    return found


def seconds(made: Estimate, gpus: Gpus, mfu: float) -> Seconds | None:
    """Return the seconds of an iteration, one part after the other; None where the peak is not known.

    The last chunks leave workers idle, and are filled up; rewards, transfers and reading of latents are not in it.
    """
    config, g = made.config, made.geometry
    half = "bfloat16" in config.precisions
    if (peak := gpus.peak("bfloat16" if half else "float32")) is None:
        return None
    rate = peak * mfu
    workers = 1 if config.cluster.backend == "local" else config.cluster.rollout_workers
    filled = math.ceil(g.chunks / workers) * g.chunk_size / g.images if g.images else 0.0
    every, ranks = config.evaluation.every, config.learner.ranks
    # Ranks divide what they ask themselves; an actor answers all of them, and each item has one of the teachers.
    askers = len(made.memory.teachers) if made.memory.teachers and not made.memory.teachers_in_learner else ranks
    update = (made.learner_flops - made.teacher_flops) / ranks + made.teacher_flops / askers
    return Seconds(
        rollout=made.rollout_flops * filled / rate,
        decoding=made.decoding_flops * filled / rate,
        learner=update / rate,
        evaluation=made.evaluation_flops / workers / every / rate if every else 0.0,
    )


def largest_sizes(made: Estimate, gpus: Gpus) -> tuple[int, int]:
    """Return the largest micro-batch and the largest chunk that fit, each beside the least of the other; 0: none."""
    item = made.algorithm.needs.item_samples
    most = max(item, math.ceil(made.geometry.transitions_per_step / made.config.learner.ranks / item) * item)
    least = made.at(micro_batch_size=item, chunk_size=1)
    micro = _largest(most // item, lambda n: _fit(least.at(micro_batch_size=n * item), gpus, "learner rank"))
    if not made.config.makes_images:
        return micro * item, 0
    images = max(made.geometry.images, made.config.evaluation.num_samples)
    return micro * item, _largest(images, lambda n: _fit(least.at(chunk_size=n), gpus, "rollout worker"))


def _fit(made: Estimate, gpus: Gpus, name: str) -> bool:
    return all(holder.fits for holder in holders_of(made, gpus) if holder.name in (name, "process"))


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number up to ``most`` that fits, all below it doing so too; 0: none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _ways(made: Estimate, gpus: Gpus, mfu: float, fixed: Collection[str]) -> Iterator[Way]:
    """Yield the ways by which the run fits, the least change first, each with larger sizes than the one before."""
    best, placed = (0.0, 0.0), _placed(made, gpus)
    if placed is None or (placed_config := changed(made.config, placed)) is None:
        return
    for changes in _changes(placed_config):
        if not changes.keys().isdisjoint(fixed) or (config := changed(placed_config, changes)) is None:
            continue
        try:
            if not all(holder.fits for holder in holders_of(estimate(config, on_gpu=True, passes=False), gpus)):
                continue  # not even without passes, which take seconds to count
            own = estimate(config, on_gpu=True)
        except ModelError:
            continue
        g = own.geometry
        sizes = largest_sizes(own, gpus)
        micro, chunk = min(sizes[0], g.micro_batch_size), min(sizes[1], g.chunk_size)
        shares = micro / g.micro_batch_size, chunk / g.chunk_size if g.chunk_size else 1.0
        if not all(shares) or shares <= best or min(shares) < min(best):
            continue
        fitting = own.at(micro_batch_size=micro, chunk_size=chunk or None)
        held = holders_of(fitting, gpus)
        if not all(holder.fits for holder in held):
            continue
        given = {**placed, **changes}
        given |= {"learner.micro_batch_size": micro} if micro < g.micro_batch_size else {}
        given |= {"rollout.chunk_size": chunk} if chunk < g.chunk_size else {}
        overrides = tuple(f"{key}={_written(value)}" for key, value in given.items())
        yield Way(overrides, micro, chunk, held, seconds(fitting, gpus, mfu))
        best = shares
        if min(shares) >= 1:
            return


def _placed(made: Estimate, gpus: Gpus) -> dict[str, Any] | None:
    """Return what lets the run be content with the GPUs that are given; None where nothing does.

    Rollouts and update follow each other, so that the time r / w + l / (n - w) is least where w : n - w is as the roots
    of their FLOPs.
    """
    config, cluster = made.config, made.config.cluster
    if needed_gpus(made) <= gpus.count:
        return {}
    if cluster.backend == "local":
        return {"learner.ranks": gpus.count}
    alone = {"cluster.backend": "local", "learner.ranks": 1, "learner.engine": "torch", "learner.zero_stage": 0}
    if gpus.count == 1:
        return alone
    if not config.makes_images:
        return {"learner.ranks": gpus.count}
    teachers = len(made.memory.teachers) * (cluster.teacher_gpus or 1.0) * cluster.has_teacher_actors
    free = int(gpus.count - teachers - cluster.reward_gpus)
    if free < 2:
        return None
    rollout, update = math.sqrt(made.rollout_flops + made.decoding_flops), math.sqrt(made.learner_flops)
    workers = min(max(1, round(free * rollout / (rollout + update))), free - 1)
    changes = {"cluster.rollout_workers": workers, "learner.ranks": free - workers}
    return {**changes, "cluster.reward_workers": 1} if cluster.reward_gpus else changes


def _changes(config: RunConfig) -> Iterator[Mapping[str, Any]]:
    """Yield what may be changed to need less, what costs least first: nothing but sizes to begin with."""
    choices = [_kept_less(config), _sharded(config), _half(config), _lora(config), _offloaded(config), _dropped(config)]
    choices += [_eight_bits(config), _decoded(config)]
    sets = [[choice for choice in chosen if choice[1]] for chosen in itertools.product(*choices)]
    for chosen in sorted(sets, key=lambda chosen: sum(cost for cost, _ in chosen)):
        yield {key: value for _, own in chosen for key, value in own.items()}


Choice = tuple[float, dict[str, Any]]  # what it costs a run, for the order alone, and the keys
_AS_IS: Choice = (0.0, {})


def _kept_less(config: RunConfig) -> list[Choice]:
    """Same bits, more work."""
    own, key = config.learner.activation_checkpointing, "learner.activation_checkpointing"
    ways: list[Choice] = [(2.0, {key: "selective"}), (2.5, {key: "blocks"})]
    return [_AS_IS, *ways[{"none": 0, "selective": 1, "blocks": 2}[own] :]]


def _sharded(config: RunConfig) -> list[Choice]:
    """More transfers between ranks; without several there is nothing to divide."""
    learner = config.learner
    if learner.ranks == 1 or learner.engine == "fsdp":
        return [_AS_IS]
    stages = range(learner.zero_stage + 1, 4) if learner.engine == "deepspeed" else ()
    return [_AS_IS, *((1.5 + 0.5 * stage, {"learner.zero_stage": stage}) for stage in stages)]


def _half(config: RunConfig) -> list[Choice]:
    """Other numbers."""
    return [_AS_IS, (4.0, {"model.dtype": "bfloat16"})] if config.model.dtype == "float32" else [_AS_IS]


def _lora(config: RunConfig) -> list[Choice]:
    """Fewer weights learn."""
    if config.model.lora is not None or config.model.transformer is not None:
        return [_AS_IS]
    return [_AS_IS, (8.0, {"model.lora": {"rank": _LORA_RANK, "alpha": 2 * _LORA_RANK}})]


def _offloaded(config: RunConfig) -> list[Choice]:
    """Same bits, more transfers; no GPU has shown it yet."""
    if config.learner.offload != "none" or config.learner.compiles:
        return [_AS_IS]
    return [_AS_IS, (3.0, {"learner.offload": "host"})]


def _eight_bits(config: RunConfig) -> list[Choice]:
    """Other numbers, of a LoRA's base."""
    if config.model.lora is None or config.model.base_dtype == "int8":
        return [_AS_IS]
    return [_AS_IS, (5.0, {"model.base_dtype": "int8"})]


def _dropped(config: RunConfig) -> list[Choice]:
    """Same bits, a longer start."""
    if not config.makes_images or not config.rollout.keeps_text_encoders:
        return [_AS_IS]
    return [_AS_IS, (0.5, {"rollout.text_encoders": "drop"})]


def _decoded(config: RunConfig) -> list[Choice]:
    """Same bits, hardly slower."""
    if not config.makes_images or config.rollout.decode_batch_size == 1:
        return [_AS_IS]
    return [_AS_IS, (0.25, {"rollout.decode_batch_size": 1})]


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig | None:
    """Return the configuration with other values at these keys; None where they do not go together."""
    raw = config.model_dump()
    for key, value in changes.items():
        section, name = key.split(".")
        raw[section] = {**raw[section], name: value}
    try:
        return type(config).model_validate(raw)
    except ValidationError:
        return None


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {own}" for key, own in value.items()) + "}"
    return str(value)


def as_dict(made: Answer) -> dict[str, Any]:
    """Return an answer as plain data; sizes in bytes, times in seconds and hours."""

    def held(holders: Sequence[Holder]) -> list[dict[str, Any]]:
        return [{**vars(holder), "fits": holder.fits} for holder in holders]

    def taken(own: Seconds | None) -> dict[str, float] | None:
        return None if own is None else {**vars(own), "iteration": own.iteration}

    return {
        "gpus": vars(made.gpus),
        "usable": USABLE,
        "needed": made.needed,
        "fits": made.fits,
        "holders": held(made.holders),
        "micro_batch_size": made.micro_batch_size,
        "chunk_size": made.chunk_size,
        "ways": [{**vars(way), "holders": held(way.holders), "seconds": taken(way.seconds)} for way in made.ways],
        "mfu": made.mfu,
        "seconds": taken(made.seconds),
        "gpu_hours": made.gpu_hours,
    }
