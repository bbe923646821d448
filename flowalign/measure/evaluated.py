"""Facts of an evaluation: standard errors, and how many samples of what, made how."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from flowalign.config.guidance import guidance_facts, said_guidance
from flowalign.config.sections import SamplingConfig
from flowalign.types import UNTAGGED, Preview, Scores, Trajectories


def by_task(scores: Scores, metadata: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return the valid scores by reward and task (``tag``).

    Tasks come in the order in which they occur; without a tag there is one task.

    A reward that is for some tasks only has no others.
    """
    tags = [str(row.get("tag") or UNTAGGED) for row in metadata]
    found: dict[str, dict[str, list[float]]] = {}
    for name, values in scores.by_reward.items():
        applies = scores.applies[name].tolist() if name in scores.applies else [True] * len(tags)
        tasks = found[name] = {tag: [] for tag, own in zip(tags, applies, strict=True) if own}
        for tag, value, own in zip(tags, values.tolist(), applies, strict=True):
            if own and math.isfinite(value):
                tasks[tag].append(value)
    return found


def standard_errors(scores: Scores, metadata: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return ``standard_error/<name>/<task>`` and ``/overall``, of the metric of the same name under ``eval/``.

    A task's is that of a mean of independent samples, NaN below two; the overall is a mean of tasks, so its is the root
    of the sum of squares over their number.
    """
    errors: dict[str, float] = {}
    for name, tasks in by_task(scores, metadata).items():
        own = {tag: _standard_error(values) for tag, values in tasks.items()}
        errors[f"standard_error/{name}/overall"] = math.hypot(*own.values()) / len(own) if own else math.nan
        if set(own) != {UNTAGGED}:
            errors |= {f"standard_error/{name}/{tag}": error for tag, error in own.items()}
    return errors


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def said_error(key: str, errors: Mapping[str, float], digits: int, counts: Mapping[str, int] | None = None) -> str:
    """Write what stands behind the value of a ``standard_error/<name>/<task>``: `` ± 0.1443``, nothing where it is not
    known.

    Samples that were all right, or all wrong, have a spread of 0, which is no certainty: they are said to be alike, of
    how many by ``counts`` of tasks. An overall over such a task is ``or more``.
    """
    error, (name, _, task) = errors.get(key, math.nan), key.rpartition("/")
    if math.isnan(error):
        return ""
    if not error:
        count = (counts or {}).get(task)
        return " (all alike within a task)" if task == "overall" else f" (all alike{f', of {count}' if count else ''})"
    tasks = (own for other, own in errors.items() if other != key and other.rpartition("/")[0] == name)
    return f" ± {error:.{digits}f}" + (" or more" if task == "overall" and 0 in tasks else "")


def facts(
    prompts: Sequence[str],
    source: str,
    prompts_there: int,
    sampling: SamplingConfig,
    seed: int,
    weights: str,
    walked: Sequence[Trajectories],
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
        **sampling.model_dump(include={"num_steps", "solver", "grid"}),
        **guidance_facts(sampling),
        "seed": seed,
        "weights": weights,
        "images_per_s": round(len(prompts) / max(seconds, 1e-9), 3),
    }
    if sampling.cache is not None:
        said["cache"] = sampling.cache.model_dump() | {"skipped_steps": skipped(walked)}
    return said


def skipped(made: Sequence[Trajectories | Preview]) -> float:
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
    steps = said["num_steps"]
    return (
        f"{steps} step{'s' * (steps > 1)} of {said['solver']}, {said_guidance(said)}, seed "
        f"{said['seed']}, weights: {said['weights']}"
    )
