"""GenEval-format prompts of the embedded world, and scenes that satisfy them.

Six tasks as in GenEval (Ghosh et al. 2023, arXiv:2310.11513). Where a task has at least 40 distinct
prompts, training and evaluation prompts are disjoint in meaning ("A and B" and "B and A", "A left of B" and
"B right of A" fall on the same side); elsewhere both splits hold the same prompts (``"held_out": "seeds"``)
and evaluation differs in its seeds only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import permutations
from typing import Any, Literal

import numpy as np

from flowalign.shapes.render import Thing
from rewards.geneval.detectors.palette import COLORS, SHAPES

Split = Literal["train", "eval"]
Pair = Literal["relation", "objects", "colors", "number"]
Metadata = dict[str, Any]

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
_INVERSE = {"right of": "left of", "below": "above"}
PAIRS: tuple[Pair, ...] = ("relation", "objects", "colors", "number")
_DISJOINT_FROM = 40
_CELLS = [(r, c) for r in range(2) for c in range(2)]


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("ss") else "s")


def _all(task: str) -> list[Metadata]:
    rows: list[Metadata] = []
    if task == "single_object":
        for shape in SHAPES:
            rows.append({"include": [{"class": shape, "count": 1}], "prompt": f"a photo of {_article(shape)}"})
    elif task == "two_object":
        for a, b in permutations(SHAPES, 2):
            include = [{"class": a, "count": 1}, {"class": b, "count": 1}]
            rows.append({"include": include, "prompt": f"a photo of {_article(a)} and {_article(b)}"})
    elif task == "counting":
        for shape in SHAPES:
            for n, word in NUMBERS.items():
                rows.append(
                    {
                        "include": [{"class": shape, "count": n}],
                        "exclude": [{"class": shape, "count": n + 1}],
                        "prompt": f"a photo of {word} {_plural(shape)}",
                    }
                )
    elif task == "colors":
        for color in COLORS:
            for shape in SHAPES:
                include = [{"class": shape, "count": 1, "color": color}]
                rows.append({"include": include, "prompt": f"a photo of {_article(color)} {shape}"})
    elif task == "position":
        for a, b in permutations(SHAPES, 2):
            for relation in RELATIONS:
                include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]
                rows.append({"include": include, "prompt": f"a photo of {_article(a)} {relation} {_article(b)}"})
    elif task == "color_attr":
        for a, b in permutations(SHAPES, 2):
            for ca, cb in permutations(COLORS, 2):
                include = [{"class": a, "count": 1, "color": ca}, {"class": b, "count": 1, "color": cb}]
                prompt = f"a photo of {_article(ca)} {a} and {_article(cb)} {b}"
                rows.append({"include": include, "prompt": prompt})
    else:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    return [{"tag": task, **row} for row in rows]


def meaning(row: Metadata) -> str:
    """Return the meaning of a row, equal for two prompts that say the same in another order."""
    things = [f"{clause.get('color', '')} {clause['class']} {clause['count']}" for clause in row["include"]]
    relation = row["include"][-1].get("position", [""])[0]
    if relation in _INVERSE:
        return f"{things[0]} {_INVERSE[relation]} {things[1]}"
    if relation:
        return f"{things[1]} {relation} {things[0]}"
    return " and ".join(sorted(things))


FACTS = {
    "first shape": len(SHAPES) + 1,
    "first color": len(COLORS) + 1,
    "second shape": len(SHAPES) + 1,
    "second color": len(COLORS) + 1,
    "relation": len(RELATIONS) + 1,
    "number": len(NUMBERS) + 2,
}
"""What a prompt may say, in the order of its words, with the number of answers; 0 is "nothing"."""


def facts(row: Metadata) -> tuple[int, ...]:
    """Say what a prompt says: an answer to each of ``FACTS``.

    ``{"prompt": "", "include": []}``, the empty prompt, says nothing.
    """
    things, colors = list(row["include"]), list(COLORS)
    relation = things[-1].get("position") if things else None
    first, second = (*(things[::-1] if relation else things), {}, {})[:2]

    def of(names: Sequence[str], name: str | None) -> int:
        return 0 if name is None else names.index(name) + 1

    return (
        of(SHAPES, first.get("class")),
        of(colors, first.get("color")),
        of(SHAPES, second.get("class")),
        of(colors, second.get("color")),
        of(RELATIONS, relation and relation[0]),
        first.get("count", 0),
    )


def _is_eval(row: Metadata) -> bool:
    """Tell whether a meaning is held out: one in four is, by its hash."""
    return hashlib.sha256(meaning(row).encode()).digest()[0] % 4 == 0


@cache
def _split(task: str, split: Split) -> tuple[Metadata, ...]:
    rows = _all(task)
    if len(rows) < _DISJOINT_FROM:
        return tuple({**row, "held_out": "seeds"} for row in rows)
    kept = [row for row in rows if _is_eval(row) == (split == "eval")]
    return tuple({**row, "held_out": "prompts"} for row in kept)


def prompts(split: Split, task: str | None = None) -> list[Metadata]:
    """Return GenEval rows (``tag, include, exclude?, prompt`` and ``held_out``) of one split, one task or all six."""
    return [dict(row) for name in (TASKS if task is None else (task,)) for row in _split(name, split)]


def minimal_pairs(kind: Pair, split: Split = "eval") -> list[tuple[Metadata, Metadata]]:
    """Return each row of a split with the row that differs from it in one thing alone, which may be of either split.

    ``kind``: ``relation`` (its opposite), ``objects`` (swapped around a relation), ``colors`` (swapped between two
    objects) or ``number`` (one more, or from four to two).
    """
    task: dict[Pair, str] = {"relation": "position", "objects": "position", "colors": "color_attr"}
    named = {facts(row): row for row in _all(task.get(kind, "counting"))}

    def other(fact: tuple[int, ...]) -> tuple[int, ...]:
        a, color_a, b, color_b, relation, number = fact
        if kind == "relation":
            return a, color_a, b, color_b, {1: 2, 2: 1, 3: 4, 4: 3}[relation], number
        if kind == "objects":
            return b, color_a, a, color_b, relation, number
        if kind == "colors":
            return a, color_b, b, color_a, relation, number
        return a, color_a, b, color_b, relation, 2 if number == max(NUMBERS) else number + 1

    return [(row, named[other(facts(row))]) for row in prompts(split, task.get(kind, "counting"))]


def sample_prompt(split: Split, rng: np.random.Generator, weights: Mapping[str, float] | None = None) -> Metadata:
    """Draw a task by its weight (default: all the same), then one of its prompts uniformly."""
    if weights is None:
        task = TASKS[int(rng.integers(len(TASKS)))]
    else:
        share = np.array([weights[task] for task in TASKS])
        task = TASKS[int(rng.choice(len(TASKS), p=share / share.sum()))]
    rows = _split(task, split)
    return dict(rows[int(rng.integers(len(rows)))])


def evaluation_set(num_samples: int) -> list[Metadata]:
    """Return ``num_samples`` evaluation rows, tasks in turn, each task walking a fixed shuffle of its prompts."""
    order = {t: np.random.default_rng(7).permutation(len(_split(t, "eval"))) for t in TASKS}
    rows = []
    for i in range(num_samples):
        task, turn = TASKS[i % len(TASKS)], i // len(TASKS)
        pool = _split(task, "eval")
        rows.append(dict(pool[int(order[task][turn % len(pool)])]))
    return rows


def scene(metadata: Metadata, rng: np.random.Generator, duplicates: float = 0.0) -> list[Thing]:
    """Return objects that satisfy a row exactly; what the prompt leaves open is drawn from ``rng``.

    With probability ``duplicates`` one of them stands there twice, in a free cell if there is one: the picture then
    holds more than its caption says, as scraped pictures do.
    """
    wanted = [(c["class"], c.get("color")) for c in metadata["include"] for _ in range(c["count"])]
    cells = [_CELLS[i] for i in rng.permutation(4)[: len(wanted)]]
    relation = metadata["include"][-1].get("position")
    if relation is not None:
        cells = _related_cells(relation[0], rng)
    names = list(COLORS)
    things = [
        Thing(shape, color or names[int(rng.integers(len(names)))], cell)
        for (shape, color), cell in zip(wanted, cells, strict=True)
    ]
    free = [cell for cell in _CELLS if cell not in cells]
    if duplicates and free and rng.random() < duplicates:
        twice = things[int(rng.integers(len(things)))]
        things.append(replace(twice, cell=free[int(rng.integers(len(free)))]))
    return things


def _related_cells(relation: str, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Return the cells (target, subject) with subject ``relation`` target: side by side on the named axis."""
    lane = int(rng.integers(2))
    near, far = {"left of": (1, 0), "right of": (0, 1), "above": (1, 0), "below": (0, 1)}[relation]
    if relation in ("left of", "right of"):
        return [(lane, near), (lane, far)]
    return [(near, lane), (far, lane)]
