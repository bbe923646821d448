"""Several models on the same samples: what each won and lost, task by task, and what their difference can be."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowalign.measure.clustered import Difference, paired_difference
from flowalign.measure.kept import Evaluation
from flowalign.types import UNTAGGED

LEVEL = 0.95
# What may differ between evaluations that are compared, or is looked at by itself.
_APART = ("prompts", "prompts_there", "num_prompts", "weights", "images_per_s", "judges", "cache", "size")


class NotComparable(ValueError):
    """Evaluations that cannot be compared: which, why, and what to do."""


@dataclass(frozen=True)
class Row:
    """One score of one task, or their ``overall``, of two models on the samples that both have a score of.

    ``won``, ``lost`` and ``tied`` count those of the second model against the first.
    """

    task: str
    before: float
    after: float
    difference: Difference
    won: int
    lost: int
    tied: int
    left_out: int

    @property
    def samples(self) -> int:
        """The samples that both have a score of."""
        return self.won + self.lost + self.tied

    @property
    def content(self) -> dict[str, Any]:
        """The row as plain data."""
        own = self.difference
        return {
            "task": self.task,
            "before": self.before,
            "after": self.after,
            "difference": own.value,
            "standard_error": own.standard_error,
            "interval": None if math.isnan(own.low) else [own.low, own.high],
            "verdict": own.verdict,
            **{key: getattr(self, key) for key in ("won", "lost", "tied", "samples", "left_out")},
            "prompts": own.prompts,
            "prompts_that_differ": own.differ,
        }


@dataclass(frozen=True)
class Compared:
    """A model against the first one by one metric; ``overall`` is the mean over the ``tasks``, which may be none."""

    label: str
    metric: str
    overall: Row
    tasks: Sequence[Row] = ()

    @property
    def rows(self) -> list[Row]:
        """All rows, the overall last."""
        return [*self.tasks, self.overall]


@dataclass(frozen=True)
class Comparison:
    """All that the scores of several evaluations say; ``level`` is each interval's confidence."""

    models: Sequence[Evaluation]
    metrics: Sequence[str]
    level: float
    found: Sequence[Compared]

    @property
    def num_samples(self) -> int:
        return len(self.models[0].rows)

    @property
    def num_prompts(self) -> int:
        return len({row["prompt"] for row in self.models[0].rows.values()})


def compare_models(models: Sequence[Evaluation], *, metrics: Sequence[str] = ()) -> Comparison:
    """Compare each model with the first one by ``metrics`` (none: all), the main one first.

    The intervals of K models against the first hold together at 95 %: each has the confidence 1 - 0.05 / K (Bonferroni;
    Dunn 1961). They are not corrected for the number of tasks and metrics.

    Raises:
        NotComparable: fewer than two models; other prompts, other sampling or another scorer; a metric that one lacks.
    """
    if len(models) < 2:
        raise NotComparable(
            "there is one model alone; name two or more, the first is what the others are compared with"
        )
    for other in models[1:]:
        check_same_samples(models[0], other)
    chosen = _metrics(models, metrics)
    level = 1 - (1 - LEVEL) / (len(models) - 1)
    found = [_compared(models[0], other, metric, level) for other in models[1:] for metric in chosen]
    return Comparison(models, chosen, level, found)


def check_same_samples(first: Evaluation, other: Evaluation) -> None:
    """Raise NotComparable where two evaluations are not of the same prompts, noises, sampling and scorers."""
    if set(first.rows) != set(other.rows):
        raise NotComparable(
            f"{other.label} has {len(other.rows)} samples, and {first.label} others or {len(first.rows)}; evaluate "
            "both with the same prompts and --num-samples"
        )
    for file, row in first.rows.items():
        if (row["prompt"], row["tag"]) != (other.rows[file]["prompt"], other.rows[file]["tag"]):
            raise NotComparable(
                f"{file} is of {row['prompt']!r} in {first.label} and of {other.rows[file]['prompt']!r} in "
                f"{other.label}; evaluate both on the same prompts"
            )
    check_same_sampling(first.label, first.made, other.label, other.made)


def check_same_sampling(label: str, first: Mapping[str, Any], other_label: str, other: Mapping[str, Any]) -> None:
    """Raise NotComparable where the facts of two evaluations (`evaluated.facts`) tell of another sampling."""
    for key in dict.fromkeys([*first, *other]):
        if key not in _APART and first.get(key) != other.get(key):
            raise _differ(key, label, first.get(key), other_label, other.get(key))
    caches = [{k: v for k, v in (made.get("cache") or {}).items() if k != "skipped_steps"} for made in (first, other)]
    if caches[0] != caches[1]:
        raise _differ("cache", label, caches[0] or None, other_label, caches[1] or None)
    sizes = [made.get("size") for made in (first, other)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise _differ("size", label, sizes[0], other_label, sizes[1])
    judges = [made.get("judges") for made in (first, other)]
    if None not in judges:
        named = [{judge["name"]: judge for judge in own} for own in judges if own is not None]
        for name in named[0].keys() & named[1].keys():
            if named[0][name] != named[1][name]:
                raise _differ(f"scorer {name}", label, named[0][name], other_label, named[1][name])


def _differ(key: str, label: str, value: Any, other_label: str, other: Any) -> NotComparable:
    return NotComparable(
        f"{key} is {json.dumps(value)} in {label} and {json.dumps(other)} in {other_label}; evaluate both alike"
    )


def _metrics(models: Sequence[Evaluation], wanted: Sequence[str]) -> list[str]:
    every = list(dict.fromkeys(name for model in models for name in model.metrics))
    for name in wanted or every:
        lacking = [model.label for model in models if name not in model.metrics]
        if lacking:
            has = next((model.label for model in models if model.label not in lacking), None)
            shared = [name for name in every if all(name in model.metrics for model in models)]
            both = f"all have {', '.join(shared)}: --metrics {','.join(shared)}" if shared else "they share none"
            where = f", which {has} has" if has else ""
            raise NotComparable(f"{lacking[0]} has no score {name!r}{where}; evaluate it with that scorer; {both}")
    return list(wanted or every)


def _compared(first: Evaluation, other: Evaluation, metric: str, level: float) -> Compared:
    rows = [(row, other.rows[file]) for file, row in first.rows.items()]
    meant = [(a, b) for a, b in rows if metric in a["scores"] or metric in b["scores"]]
    tasks: dict[str, list[Any]] = {}
    for a, b in meant:
        tasks.setdefault(a["tag"], []).append((a, b))
    by_task = [_row(task, own, metric, level) for task, own in tasks.items()]
    overall = _row("overall", meant, metric, level)
    return Compared(other.label, metric, overall, () if set(tasks) == {UNTAGGED} else by_task)


def _row(task: str, pairs: Sequence[tuple[Any, Any]], metric: str, level: float) -> Row:
    """Compare the pairs of a task, or the mean of the tasks of all."""
    valid = [(a, b) for a, b in pairs if None not in (a["scores"].get(metric), b["scores"].get(metric))]
    before, after = (np.array([pair[side]["scores"][metric] for pair in valid], np.float64) for side in (0, 1))
    tags = [a["tag"] for a, _ in valid]
    difference = paired_difference(before, after, [a["prompt"] for a, _ in valid], tags, level=level)
    if len(set(tags)) < len({a["tag"] for a, _ in pairs}):  # a task without a pair: leaving it out would flatter
        nothing = float("nan")
        difference = Difference(nothing, nothing, nothing, nothing, difference.prompts, difference.differ)
    first, second = _over_tasks(before, tags), _over_tasks(after, tags)
    won, lost = int((after > before).sum()), int((after < before).sum())
    return Row(task, first, second, difference, won, lost, len(valid) - won - lost, len(pairs) - len(valid))


def _over_tasks(values: NDArray[np.float64], tags: Sequence[str]) -> float:
    own = np.array(tags)
    means = [values[own == tag].mean() for tag in dict.fromkeys(tags)]
    return float(np.mean(means)) if means else float("nan")
