"""Facts of an evaluation: standard errors, and how many samples of what, made how."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from flowalign.config.guidance import guidance_facts, said_guidance
from flowalign.config.sections import RewardConfig, SamplingConfig
from flowalign.measure.clustered import clustered_mean
from flowalign.types import UNTAGGED, Preview, Scores, Trajectories


def by_task(scores: Scores, metadata: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return the valid scores by reward and task (``tag``).

    Tasks come in the order in which they occur; without a tag there is one task.

    A reward that is for some tasks only has no others.
    """
    return {
        name: {tag: scores.by_reward[name][rows].tolist() for tag, rows in tasks.items()}
        for name, tasks in rows_by_task(scores, metadata).items()
    }


def rows_by_task(scores: Scores, metadata: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """Return which samples have a valid score, by reward and task, as `by_task` returns the scores."""
    tags = [str(row.get("tag") or UNTAGGED) for row in metadata]
    found: dict[str, dict[str, list[int]]] = {}
    for name, values in scores.by_reward.items():
        applies = scores.applies[name].tolist() if name in scores.applies else [True] * len(tags)
        tasks = found[name] = {tag: [] for tag, own in zip(tags, applies, strict=True) if own}
        for row, (tag, value, own) in enumerate(zip(tags, values.tolist(), applies, strict=True)):
            if own and math.isfinite(value):
                tasks[tag].append(row)
    return found


def standard_errors(
    scores: Scores, metadata: Sequence[Mapping[str, Any]], prompts: Sequence[str] | None = None
) -> dict[str, float]:
    """Return ``standard_error/<name>/<task>`` and ``/overall``, of the metric of the same name under ``eval/``.

    A task's is that of a `clustered_mean`, in which samples of one prompt count together; NaN below two prompts. The
    overall's is that of the mean of the tasks. Without ``prompts`` each sample has its own.
    """
    owner: Sequence[Hashable] = range(len(metadata)) if prompts is None else prompts
    errors: dict[str, float] = {}
    for name, tasks in rows_by_task(scores, metadata).items():
        values = scores.by_reward[name].double()

        def error(own: Mapping[str, Sequence[int]], values: Tensor = values) -> float:
            rows = [row for task in own.values() for row in task]
            tags = [tag for tag, task in own.items() for _ in task]
            return clustered_mean(values[rows].numpy(), [owner[row] for row in rows], tags).standard_error

        errors[f"standard_error/{name}/overall"] = error(tasks) if all(tasks.values()) else math.nan
        if set(tasks) != {UNTAGGED}:
            errors |= {f"standard_error/{name}/{tag}": error({tag: rows}) for tag, rows in tasks.items()}
    return errors


def counts(scores: Scores, metadata: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return ``num_samples/<name>/<task>`` and ``/overall``: how many valid samples each metric is a mean of."""
    found: dict[str, int] = {}
    for name, tasks in rows_by_task(scores, metadata).items():
        own = {tag: len(rows) for tag, rows in tasks.items()}
        found[f"num_samples/{name}/overall"] = sum(own.values())
        if set(own) != {UNTAGGED}:
            found |= {f"num_samples/{name}/{tag}": count for tag, count in own.items()}
    return found


def said_error(key: str, errors: Mapping[str, float | None], digits: int, count: int | None = None) -> str:
    """Write what stands behind the value of a ``standard_error/<name>/<task>``: `` ± 0.1443``, nothing where it is not
    known.

    Samples that were all right, or all wrong, have a spread of 0, which is no certainty: they are said to be alike, of
    ``count``. An overall over such a task is ``or more``.
    """
    error, (name, _, task) = errors.get(key), key.rpartition("/")
    if error is None or math.isnan(error):
        return ""
    if not error:
        of = f", of {count}" if count else ""
        return " (all alike within a task)" if task == "overall" else f" (all alike{of})"
    tasks = (own for other, own in errors.items() if other != key and other.rpartition("/")[0] == name)
    return f" ± {error:.{digits}f}" + (" or more" if task == "overall" and 0 in tasks else "")


def facts(
    prompts: Sequence[str],
    source: str,
    prompts_there: int,
    sampling: SamplingConfig,
    seed: int,
    weights: str,
    walked: Sequence[Trajectories | Walked],
    seconds: float,
) -> dict[str, Any]:
    """Return facts for the reader: how many samples of which prompts, made how; with a cache how much was skipped.

    ``images_per_s`` is of sampling and decoding, without scoring.
    """
    said: dict[str, Any] = {
        "num_samples": len(prompts),
        "num_prompts": len(set(prompts)),
        "prompts": source,
        "prompts_there": prompts_there,
        **sampling_facts(sampling, seed),
        "weights": weights,
        "images_per_s": round(len(prompts) / max(seconds, 1e-9), 3),
    }
    if sampling.cache is not None:
        said["cache"] |= {"skipped_steps": skipped(walked)}
    return said


def sampling_facts(sampling: SamplingConfig, seed: int) -> dict[str, Any]:
    """Return those of `facts` that are known before anything is sampled."""
    said = sampling.model_dump(include={"num_steps", "solver", "grid"}) | guidance_facts(sampling) | {"seed": seed}
    return said if sampling.cache is None else said | {"cache": sampling.cache.model_dump()}


class Walked(NamedTuple):
    """What is kept of the walks of a chunk: the network's evaluations that went through its blocks, and not."""

    computed: int
    reused: int


def judge_facts(judge: RewardConfig) -> dict[str, Any]:
    """Return what tells one scorer from another, wherever its files lie: their names stand for paths."""
    named = {"spec": judge.spec, "options": judge.options, "tasks": judge.tasks}
    return {"name": judge.label, **{key: _nameless(value) for key, value in named.items() if value}}


def _nameless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _nameless(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_nameless(own) for own in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def skipped(made: Sequence[Trajectories | Preview | Walked]) -> float:
    """Return the share of the network's evaluations whose blocks were skipped."""
    computed, reused = (sum(getattr(part, name) for part in made) for name in ("computed", "reused"))
    return reused / max(1, computed + reused)


def text(said: Mapping[str, Any]) -> str:
    """Write the facts as one line."""
    if "num_steps" not in said:  # of pictures that were there
        return f"{said['num_samples']} images of {said['num_prompts']} prompts in {said['prompts']}"
    line = (
        f"{said['num_samples']} samples of {said['num_prompts']} of {said['prompts_there']} prompts "
        f"({said['prompts']}); {made_with(said)}; {said['images_per_s']:.3g} img/s"
    )
    cache = said.get("cache")
    if cache is not None:
        line += f"; {cache['skipped_steps']:.0%} of the steps skipped by the cache, threshold {cache['threshold']:g}"
    return line


def made_with(said: Mapping[str, Any]) -> str:
    """Say how images were made: ``10 steps of euler, guidance 1, seed 0, weights: model``."""
    steps, begun = said["num_steps"], f"noise of {said['noise']}" if "noise" in said else f"seed {said['seed']}"
    walked = f"{steps} step{'s' * (steps > 1)} of {said['solver']}, {said_guidance(said)}"
    return f"{walked}, {begun}, weights: {said['weights']}"
