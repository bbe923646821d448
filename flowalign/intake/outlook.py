"""What would run: the facts of a run that is about to start, for people as rows and for programs as an object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowalign.config.alignment import AlignConfig
from flowalign.config.guidance import guidance_facts, said_guidance
from flowalign.config.run import RunConfig
from flowalign.config.sections import RewardConfig
from flowalign.config.training import PretrainConfig
from flowalign.intake.paths import shipped_names
from flowalign.intake.ready import Ready
from flowalign.models.directory import open_directory
from flowalign.plan import Plan, make_plan
from flowalign.plan.answer import processes
from flowalign.plan.rows import count_text, memory_text
from flowalign.record.disk import free_bytes, size_text
from flowalign.run.prepared import Prepared

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Outlook:
    """A run that is about to start, and the plan of it."""

    own: Ready
    prepared: Prepared
    plan: Plan

    @property
    def notes(self) -> tuple[str, ...]:
        """What the plan finds odd."""
        return self.plan.notes

    @property
    def rows(self) -> Rows:
        """What would run, a label and a value each."""
        config, plan = self.own.config, self.plan
        found = [("command", self._begins()), ("model", _model(config, plan)), ("algorithm", _algorithm(config, plan))]
        if isinstance(config, AlignConfig) and config.data.preferences is None:
            found.append(("rewards", ", ".join(map(_reward, config.rewards)) or "none"))
        found += [("update", _update(config, plan)), ("evaluation", _evaluation(config)), ("runs on", _place(config))]
        sizes = [f"{_each(count, name)} {memory_text(size)}" for name, count, _, size in processes(config, plan.memory)]
        return [*found, ("memory", f"{', '.join(sizes)}, estimated"), ("writes", _written(self.own.run_dir, plan))]

    def _begins(self) -> str:
        config, start = self.own.config, self.prepared.start
        how = f"goes on after iteration {start}" if self.prepared.saved is not None else "begins anew"
        return f"{self.own.command}, {count_text(config.total, 'iteration')}, {how}"

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as plain data, sizes in bytes."""
        config, plan = self.own.config, self.plan
        height, width = _pixels(config, plan)
        held = processes(config, plan.memory)
        return {
            "command": self.own.command,
            "run": str(self.own.run_dir),
            "iterations": config.total,
            "done": self.prepared.start,
            "model": {
                "path": shipped_names(config.model.path),
                "family": open_directory(config.model).family.name,
                "height": height,
                "width": width,
                "dtype": config.model.dtype,
                "parameters": plan.model.transformer,
                "trained": plan.model.trainable,
            },
            "algorithm": config.algorithm["type"],
            "samples": plan.geometry.images or plan.geometry.transitions,
            "rewards": [reward.label for reward in config.trained_rewards],
            "evaluation": {"every": config.evaluation.every, "judges": [own.label for own in config.evaluation.judges]},
            "backend": config.cluster.backend,
            "device": config.device,
            "memory": [{"name": name, "count": count, "bytes": size} for name, count, _, size in held],
            "disk": {"needed": plan.disk.total, "free": free_bytes(self.own.run_dir)},
            "notes": list(self.notes),
        }


def outlook(own: Ready, prepared: Prepared) -> Outlook:
    """Return what would run. Raise ModelError where the model's files do not say how large it is."""
    return Outlook(own, prepared, make_plan(own.config))


def _pixels(config: RunConfig, plan: Plan) -> tuple[int, int]:
    factor = open_directory(config.model).geometry.factor
    _, rows, columns = plan.model.latent_shape
    return rows * factor, columns * factor


def _model(config: RunConfig, plan: Plan) -> str:
    model, title = config.model, open_directory(config.model).family.title
    height, width = _pixels(config, plan)
    learned = "all trained" if model.lora is None else f"{plan.model.trainable:,} trained: {model.lora.described}"
    sizes = f"{height}x{width} pixels, {model.dtype}, {plan.model.transformer:,} parameters, {learned}"
    teacher = config.teacher if isinstance(config, PretrainConfig) else None
    taught = "" if teacher is None else f"; teacher {shipped_names(teacher.path)}"
    return f"{shipped_names(model.path)} ({title}), {sizes}{taught}"


def _algorithm(config: RunConfig, plan: Plan) -> str:
    g, name = plan.geometry, str(config.algorithm["type"])
    if isinstance(config, PretrainConfig):
        return f"{name}, {count_text(config.batch_size, 'latent')} an iteration"
    if isinstance(config, AlignConfig) and config.data.preferences is not None:
        return f"{name}, {count_text(g.groups, 'pair')} an iteration"
    if not g.images:
        return name
    made = f"{count_text(g.groups, 'group')} of {g.group_size}, {count_text(g.images, 'image')} an iteration"
    walked = f", {count_text(g.num_steps, 'step')}, {g.window_steps} of them with noise" if g.num_steps else ""
    return f"{name}, {made}{walked}"


def _reward(reward: RewardConfig) -> str:
    if reward.gold:
        return f"{reward.label} (gold, measured alone)"
    parts = "".join(f" + {weight:g} {name}" for name, weight in reward.terms.items() if name != reward.label)
    return f"{reward.label} (weight {reward.weight:g}{parts}{_tasks(reward.tasks)})"


def _tasks(tasks: Sequence[str] | None) -> str:
    return "" if tasks is None else f", of {', '.join(tasks)}"


def _update(config: RunConfig, plan: Plan) -> str:
    g, learner = plan.geometry, config.learner
    what = "latent" if isinstance(config, PretrainConfig) else "item"
    size = f"{count_text(g.transitions_per_step, what)} in micro-batches of {g.micro_batch_size}"
    stage = f" ZeRO {learner.zero_stage}" if learner.zero_stage else ""
    phases = config.stretches if isinstance(config, PretrainConfig) else ()
    rate = f"learning rate {max((own.learning_rate for own in phases), default=learner.optimizer.learning_rate):g}"
    steps = count_text(g.optimizer_steps, "update")
    return f"{steps} of {size}, {rate}; {learner.engine}{stage}, {count_text(learner.ranks, 'rank')}"


def _evaluation(config: RunConfig) -> str:
    own = config.evaluation
    if not own.every:
        return "none"
    judged = f"by {', '.join(judge.label for judge in own.judges)}" if own.judges else "images alone"
    guided = said_guidance(guidance_facts(own))
    made = f"{count_text(own.num_samples, 'sample')}, {count_text(own.num_steps, 'step')} of {own.solver}, {guided}"
    return f"every {own.every} iterations: {made}, of the weights {own.weights}, {judged}"


def _place(config: RunConfig) -> str:
    cluster = config.cluster
    if cluster.backend == "local":
        return f"{config.device}, this process without Ray"
    where = "on this machine" if cluster.address is None else f"at {cluster.address}"
    images = config.makes_images
    actors = {"rollout": cluster.rollout_workers * images, "reward": cluster.reward_workers * images}
    actors["learner"] = config.learner.ranks
    return f"{config.device}, Ray {where}: {', '.join(f'{count} {name}' for name, count in actors.items() if count)}"


def _each(count: int, name: str) -> str:
    return f"a {name}" if count == 1 else f"each of {count} {name}s"


def _written(run_dir: Path, plan: Plan) -> str:
    disk, free = plan.disk, free_bytes(run_dir)
    room = "" if free is None else f"; its disk has {size_text(free)} free"
    kept = count_text(disk.checkpoints, "checkpoint")
    return f"{run_dir}, at most {size_text(disk.total)}: {kept} of {size_text(disk.checkpoint)} at a time{room}"
