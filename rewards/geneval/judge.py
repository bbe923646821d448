"""The GenEval judge: do the detected objects satisfy a prompt's clauses?

``judge`` gives three answers about one image. ``correct`` follows the public benchmark
(Ghosh et al. 2023, arXiv:2310.11513; djghosh13/geneval, ``evaluation/evaluate_images.py``): at least
``count`` objects of a class, colour and position tested on the ``count`` most confident of them, then
``exclude``. ``strict`` also wants the exact counts. ``score`` is partial credit in [0, 1] for training.

A box is x0, y0, x1, y1 in pixels, y pointing down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rewards.geneval.rows import canonical, read_row
from rewards.interface import InputError

Detection = dict[str, Any]
Detections = Mapping[str, Sequence[Detection]]

_NO_OFFSET = 1e-3
KINDS = ("objects", "counts", "colors", "positions")


@dataclass(frozen=True)
class Rules:
    """Thresholds of the public benchmark; a detection counts where its score is above, not at, the threshold."""

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    position_threshold: float = 0.1


BENCHMARK = Rules()


@dataclass(frozen=True)
class Verdict:
    """``objects`` are the detections that were counted, by class, most confident first.

    ``credits`` are means of the numbers whose mean is ``score``, by kind of condition: counts of one (``objects``) and
    of more (``counts``), ``colors``, ``positions``. A kind that the prompt has no condition of is left out.
    """

    correct: bool
    score: float
    strict: bool
    reason: str
    objects: Mapping[str, Sequence[Detection]] = field(default_factory=dict, compare=False)
    credits: Mapping[str, float] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class _Clause:
    """One ``include`` entry judged: ``matched`` as the benchmark says, ``credits`` a kind and a number a condition."""

    matched: bool
    credits: tuple[tuple[str, float], ...]
    exact: bool
    reasons: tuple[str, ...]
    objects: tuple[Detection, ...] = ()


def judge(metadata: Mapping[str, Any], detections: Detections, rules: Rules = BENCHMARK) -> Verdict:
    """Judge one image; raises ``InputError`` for metadata or detections that are not GenEval's format.

    The partial credit is the mean over the conditions of all ``include`` clauses: 1 − min(1, |n − found|/n)
    for a count and, over the objects of the wanted colour, for a colour; 0 or 1 for a position.
    """
    include, exclude = read_row(metadata)
    objects = keep(metadata, detections, rules)
    clauses: list[_Clause] = []
    for wanted in include:
        clauses.append(_judge_clause(wanted, objects.get(wanted["class"], []), clauses, rules))
    reasons = [reason for clause in clauses for reason in clause.reasons]
    correct = all(clause.matched for clause in clauses)
    for unwanted in exclude:
        found = len(objects.get(unwanted["class"], []))
        if found >= unwanted["count"]:
            correct = False
            reasons.append(f"expected {unwanted['class']}<{unwanted['count']}, found {found}")
    credits = [credit for clause in clauses for credit in clause.credits]
    by_kind = {kind: [value for own, value in credits if own == kind] for kind in KINDS}
    return Verdict(
        correct=correct,
        score=float(np.mean([value for _, value in credits])),
        strict=correct and all(clause.exact for clause in clauses),
        reason="\n".join(reasons),
        objects=objects,
        credits={kind: float(np.mean(values)) for kind, values in by_kind.items() if values},
    )


def keep(metadata: Mapping[str, Any], detections: Detections, rules: Rules) -> dict[str, list[Detection]]:
    """Return the detections that count, most confident first, ties ordered by box and colour; at most 16 a class."""
    threshold = rules.counting_threshold if canonical(str(metadata.get("tag"))) == "counting" else rules.threshold
    try:
        by_class: dict[str, list[Detection]] = {}
        for name, items in detections.items():
            by_class.setdefault(canonical(name), []).extend(item for item in items if item["score"] > threshold)
        return {name: sorted(items, key=_order)[: rules.max_objects] for name, items in by_class.items()}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise InputError(
            f"detections are not {{class: [{{box: [x0, y0, x1, y1], score, color}}]}} ({type(error).__name__}: {error})"
        ) from error


def _order(item: Detection) -> tuple[float, list[float], str]:
    box = [float(edge) for edge in item["box"]]
    if len(box) != 4:
        raise ValueError(f"a box has {len(box)} numbers")
    return -item["score"], box, item.get("color") or ""


def _judge_clause(
    wanted: Mapping[str, Any], found: Sequence[Detection], earlier: Sequence[_Clause], rules: Rules
) -> _Clause:
    name, count = wanted["class"], wanted["count"]
    best = tuple(found[:count])
    credits = [("objects" if count == 1 else "counts", _closeness(count, len(found)))]
    reasons: list[str] = []
    matched = len(best) >= count
    if not matched:
        reasons.append(f"expected {name}>={count}, found {len(best)}")
    if "color" in wanted:
        color = wanted["color"]
        credits.append(("colors", _closeness(count, sum(_color(item) == color for item in found))))
        seen = Counter(_color(item) for item in best)
        if matched and seen[color] < count:
            matched = False
            listed = ", ".join(f"{n} {c}" for c, n in sorted(seen.items(), key=str))
            reasons.append(f"expected {color} {name}>={count}, found {seen[color]} {color}; and {listed}")
    if "position" in wanted:
        if matched:
            reason = _misplaced(wanted, best, earlier, rules)
            matched = reason is None
            reasons += [] if reason is None else [reason]
        credits.append(("positions", float(matched)))
    return _Clause(matched, tuple(credits), len(found) == count, tuple(reasons), best)


def _color(item: Detection) -> str | None:
    color = item.get("color")
    return canonical(color) if isinstance(color, str) else color


def _closeness(n: int, found: int) -> float:
    return 1 - min(1.0, abs(n - found) / n)


def _misplaced(
    wanted: Mapping[str, Any], best: Sequence[Detection], earlier: Sequence[_Clause], rules: Rules
) -> str | None:
    """Say why the objects do not stand as wanted to every object of the target clause; None where they do."""
    name, (relation, index) = wanted["class"], wanted["position"]
    target = earlier[index]
    if not target.matched:
        return f"no target for {name} to be {relation}"
    for item in best:
        for other in target.objects:
            relations = relative_position(item["box"], other["box"], rules.position_threshold)
            if relation not in relations:
                return f"expected {name} {relation} target, found {' and '.join(sorted(relations))} target"
    return None


def relative_position(box: Sequence[float], target: Sequence[float], threshold: float = 0.1) -> set[str]:
    """Return the relations in which ``box`` stands to ``target``; empty where their centres nearly coincide.

    The centres' offset, shortened on each axis by ``threshold`` times the summed extents, over the offset's
    length: a component beyond ±0.5 is a relation.
    """
    (a, b) = np.array([box, target], dtype=np.float64).reshape(2, 2, 2)
    offset = a.mean(axis=0) - b.mean(axis=0)
    extent = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    revised = np.maximum(np.abs(offset) - threshold * extent, 0) * np.sign(offset)
    if np.all(np.abs(revised) < _NO_OFFSET):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    tests = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, holds in tests.items() if holds}
