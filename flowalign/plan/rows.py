"""A plan for people: sections of rows, each a label and what is said of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from flowalign.plan.answer import USABLE, Answer, Holder, Seconds, Way
from flowalign.plan.disk import Disk
from flowalign.plan.geometry import Geometry
from flowalign.plan.memory import Memory
from flowalign.record.disk import size_text
from flowalign.record.progress import duration

if TYPE_CHECKING:
    from flowalign.plan import Plan

GIB = 2**30
Rows = list[tuple[str, ...]]


def plan_sections(plan: Plan) -> list[tuple[str, Rows]]:
    """Return the plan as sections: a title, and rows of a label and a value."""
    found = [("Iteration", _iteration(plan)), ("Model", _model(plan)), ("Memory at the most", _memory(plan))]
    found.append(("Disk", _disk(plan.disk)))
    return found


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return all rows of the plan, label and value."""
    return [(row[0], row[1]) for _, rows in plan_sections(plan) for row in rows]


def _iteration(plan: Plan) -> Rows:
    g = plan.geometry
    rows: Rows = []
    if g.images:
        groups, chunks = count_text(g.groups, "group"), count_text(g.chunks, "chunk")
        rows.append(("images", f"{g.images} = {groups} of {g.group_size}, in {chunks} of {g.chunk_size}"))
    if g.num_steps:
        rows.append(("trajectory", f"{count_text(g.num_steps, 'step')}, {g.window_steps} of them stochastic"))
    what = item_text(g)
    rows.append((f"{what}s", f"{g.transitions}") if g.images else ("batch", count_text(g.transitions, what)))
    micro = count_text(g.micro_batches_per_step, "micro-batch", "es")
    update = f"{count_text(g.optimizer_steps, 'optimizer step')}, each {count_text(g.transitions_per_step, what)}"
    rows.append(("update", f"{update} in {micro} of {g.micro_batch_size}"))
    if g.images:
        rows.append(("rollout", f"{flops_text(plan.rollout_flops)} an iteration"))
        if plan.decoding_flops:
            rows.append(("decoding", f"{flops_text(plan.decoding_flops)} an iteration"))
    rows.append(("learner", f"{flops_text(plan.learner_flops)} an iteration"))
    if g.evaluation_passes:
        rows.append(("evaluation", f"{flops_text(plan.evaluation_flops)} each"))
    return rows


def _model(plan: Plan) -> Rows:
    m = plan.model
    frozen = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in m.frozen.items())
    return [
        ("sizes from", m.source),
        ("transformer", f"{m.transformer:,} parameters, {m.trainable:,} of them trained"),
        ("frozen", frozen or "no configuration found"),
        ("latents", f"{'x'.join(map(str, m.latent_shape))}, {m.image_tokens} image and {m.text_tokens} text tokens"),
        ("one forward", f"{flops_text(m.flops)} a sample"),
    ]


def _memory(plan: Plan) -> Rows:
    memory = plan.memory
    rows: Rows = []
    if memory.rollout_worker:
        rows.append(("rollout worker", f"{memory_text(memory.rollout_worker)}: {_rollout_terms(memory)}"))
    rows.append(("learner rank", f"{memory_text(memory.learner_rank)}: {_learner_terms(memory)}"))
    if plan.geometry.images:
        rows.append(("trajectories", f"{memory_text(memory.trajectories)} an iteration, in the machine's memory"))
    if plan.num_texts:
        rows.append(("embeddings", _embeddings(memory, plan.num_texts)))
    if memory.teachers:
        where = "in every learner rank" if memory.teachers_in_learner else "each in an actor that all ranks ask"
        named = ", ".join(f"{name} {memory_text(count)}" for name, count in memory.teachers.items())
        rows.append(("teachers", f"{where}: {named}"))
    return rows


def _rollout_terms(memory: Memory) -> str:
    text = {"text encoders": memory.text_encoders} if memory.keeps_text_encoders else {}
    held = {"network": memory.rollout_network, **text, "autoencoder": memory.autoencoder}
    working = {"the pass of a chunk": memory.rollout_activations, "decoding": memory.rollout_decoding}
    return f"{_terms(held)}, and {_terms(working, ' or ')}"


def _learner_terms(memory: Memory) -> str:
    held = {
        "weights": memory.learner_weights,
        "optimizer": memory.learner_optimizer,
        "EMA": memory.learner_ema,
        "reference": memory.learner_reference,
        "other networks": memory.learner_frozen,
    }
    working = {"gradients": memory.learner_gradients, "activations": memory.learner_activations}
    joined = " and " if memory.gradients_stay else " or "
    away = memory.learner_offloaded
    said = f"; {memory_text(away)} of these are kept off the device, and not counted" if away else ""
    return f"{_terms(held)}, and {_terms(working, joined)}{said}"


def _terms(terms: Mapping[str, int], joined: str = ", ") -> str:
    return joined.join(f"{name} {memory_text(count)}" for name, count in terms.items() if count) or "nothing"


def _embeddings(memory: Memory, num_texts: int) -> str:
    kept = "in every rollout worker" if memory.keeps_text_encoders else "loaded apart, to encode what is missing"
    return (
        f"of {count_text(num_texts, 'text')}, at most {memory_text(memory.embeddings)} on disk; "
        f"text encoders of {memory_text(memory.text_encoders)}, {kept}"
    )


def _disk(disk: Disk) -> Rows:
    kept = count_text(disk.checkpoints, "checkpoint")
    rows: Rows = [("checkpoints", f"{size_text(disk.checkpoint)} each, {kept} at a time")]
    if disk.samples:
        rows.append(("samples", f"at most {size_text(disk.samples)}"))
    rows.append(("in all", f"at most {size_text(disk.total)}"))
    return rows


def answer_sections(made: Answer) -> Iterator[tuple[str, Rows]]:
    """Give what is answered of GPUs as sections; the verdict is `verdict`."""
    yield f"On {made.gpus.described}, {USABLE:.0%} of it given away", [_of_holder(holder) for holder in made.holders]
    rows: Rows = []
    if made.micro_batch_size:
        rows.append(("largest micro-batch", f"learner.micro_batch_size={made.micro_batch_size}"))
    if made.chunk_size:
        rows.append(("largest chunk", f"rollout.chunk_size={made.chunk_size}"))
    if made.seconds is not None and made.gpu_hours is not None:
        rows.append(("an iteration", f"{_time(made.seconds)}, at an MFU of {made.mfu:.0%}, without rewards"))
        hours = made.gpu_hours
        rows.append(("the run", f"{hours:,.1f} GPU-hours" if hours >= 1 else f"{hours * 60:,.1f} GPU-minutes"))
    if rows:
        yield "As it is configured", rows
    if made.ways:
        yield "What would fit", [row for number, way in enumerate(made.ways, 1) for row in _of_way(number, way)]


def verdict(made: Answer) -> str:
    """Say in one line whether the run fits."""
    if not made.enough:
        given = f"{made.gpus.count} {'is' if made.gpus.count == 1 else 'are'} given"
        return f"does not fit: it asks for {made.needed:g} GPUs, and {given}"
    short = [holder for holder in made.holders if not holder.fits]
    if not short:
        return "fits"
    lacking = "; ".join(f"a {holder.name} lacks {memory_text(holder.bytes - holder.room)}" for holder in short)
    return f"does not fit: {lacking}" + ("" if made.ways else ", and nothing that is counted here would change it")


def _of_holder(holder: Holder) -> tuple[str, ...]:
    where = count_text(holder.count, "GPU") if holder.share == 1 else f"{holder.count} x {holder.share:g} GPU"
    held = f"{holder.bytes / GIB:7.1f} of {holder.room / GIB:.1f} GiB"
    return holder.name, where, held, _bar(holder.bytes / holder.room), "fits" if holder.fits else "too much"


def _bar(share: float) -> str:
    filled = min(20, round(share * 20))
    return f"[{'#' * filled}{'.' * (20 - filled)}] {share:4.0%}"


def _of_way(number: int, way: Way) -> Sequence[tuple[str, ...]]:
    held = ", ".join(f"{holder.name} {holder.bytes / GIB:.1f} GiB" for holder in way.holders)
    taken = "" if way.seconds is None else f"; {_duration(way.seconds.iteration)} an iteration"
    return [(f"{number}.", " ".join(map(_quoted, way.overrides))), ("", f"{held}{taken}")]


def _quoted(override: str) -> str:
    return f"'{override}'" if " " in override else override


def _time(taken: Seconds) -> str:
    parts = {"rollout": taken.rollout, "decoding": taken.decoding, "update": taken.learner}
    parts |= {"its share of an evaluation": taken.evaluation}
    named = ", ".join(f"{name} {_duration(own)}" for name, own in parts.items() if own)
    return f"{_duration(taken.iteration)} ({named})"


def _duration(seconds: float) -> str:
    return duration(seconds) if seconds >= 0.1 else f"{seconds * 1000:.1f} ms"


def item_text(geometry: Geometry) -> str:
    """Name what is learned from: a step with noise, a latent on disk, or what else an algorithm makes of images."""
    if not geometry.images:
        return "latent"
    return "transition" if geometry.window_steps else "item"


def count_text(count: int, what: str, ending: str = "s") -> str:
    """Write a number and what it counts."""
    return f"{count} {what}{'' if count == 1 else ending}"


def flops_text(count: int) -> str:
    """Write FLOPs in the largest unit of which there is one."""
    for unit, size in (("PFLOP", 10**15), ("TFLOP", 10**12), ("GFLOP", 10**9)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 10**6:,.2f} MFLOP"


def memory_text(count: int) -> str:
    """Write bytes of memory."""
    return f"{count / GIB:,.2f} GiB" if count >= GIB // 10 else f"{count / 2**20:,.1f} MiB"
