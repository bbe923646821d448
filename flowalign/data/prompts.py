"""Prompts and groups: which samples an iteration makes, as a function of (seed, iteration)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flowalign.algorithm import seeded
from flowalign.shapes import prompts as shapes
from flowalign.types import PromptBatch

Row = dict[str, Any]


class PromptsError(ValueError):
    """A prompt file that is missing, empty or malformed."""


def load_prompts(source: str, base_dir: Path = Path(".")) -> list[Row]:
    """Rows with at least ``prompt``: ``shapes:train``, ``shapes:eval`` or a jsonl file.

    Raises:
        PromptsError: names the file and line.
    """
    if source in ("shapes:train", "shapes:eval"):
        return shapes.prompts("train" if source == "shapes:train" else "eval")
    path = base_dir / source
    if not path.is_file():
        raise PromptsError(f"data.prompts: {path} does not exist; give shapes:train, shapes:eval or a jsonl file")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise PromptsError(
                f"data.prompts: {path}, line {number} is not JSON ({error}); "
                'write a row a line: {"tag": "colors", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}'
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise PromptsError(f'data.prompts: {path}, line {number} has no "prompt" string')
        rows.append(row)
    if not rows:
        raise PromptsError(f"data.prompts: {path} holds no prompt")
    return rows


class GroupSampler:
    """Draws the groups of an iteration: tasks (``tag``) in turn, by weight, then a prompt of the task.

    Tasks without a weight have weight 1. The prompts are a shuffle within each task, walked without replacement and
    reshuffled each pass.

    Raises:
        PromptsError: ``task_weights`` names a task that no prompt has.
    """

    def __init__(
        self,
        rows: list[Row],
        *,
        groups: int,
        group_size: int,
        seed: int,
        task_weights: Mapping[str, int] | None = None,
    ) -> None:
        self._by_task: dict[str, list[Row]] = {}
        for row in rows:
            self._by_task.setdefault(_task(row), []).append(row)
        self._cycle = task_cycle(rows, task_weights or {})
        self.groups, self.group_size, self.seed = groups, group_size, seed

    def batch(self, iteration: int) -> PromptBatch:
        """``groups * group_size`` samples of an iteration, group after group."""
        chosen = [self._pick(iteration * self.groups + g) for g in range(self.groups)]
        count = self.groups * self.group_size
        first = iteration * count
        return PromptBatch(
            prompts=tuple(row["prompt"] for row in chosen for _ in range(self.group_size)),
            group_ids=tuple(iteration * self.groups + g for g in range(self.groups) for _ in range(self.group_size)),
            sample_ids=tuple(range(first, first + count)),
            metadata=tuple(row for row in chosen for _ in range(self.group_size)),
        )

    def _pick(self, turn: int) -> Row:
        passes, place = divmod(turn, len(self._cycle))
        task = self._cycle[place]
        used = passes * self._cycle.count(task) + self._cycle[:place].count(task)
        pool = self._by_task[task]
        index = list(self._by_task).index(task)
        order = torch.randperm(len(pool), generator=seeded(self.seed, 7, index, used // len(pool)))
        return pool[int(order[used % len(pool)])]


def _task(row: Row) -> str:
    return str(row.get("tag", ""))


def task_cycle(rows: list[Row], weights: Mapping[str, int]) -> list[str]:
    """The order in which tasks have their turns: each as often as its weight, spread out; equal ones in file order.

    Raises:
        PromptsError: a weight for a task that no prompt has, or nothing but zeros.
    """
    tasks = dict.fromkeys((_task(row) for row in rows), 1)
    if unknown := sorted(weights.keys() - tasks.keys()):
        has = ", ".join(tasks)
        raise PromptsError(f"data.task_weights: no prompt has the task {unknown[0]!r}; the prompts have: {has}")
    turns = [((k + 0.5) / n, task) for task, n in (tasks | dict(weights)).items() for k in range(n)]
    if not turns:
        raise PromptsError("data.task_weights: all weights are 0, which leaves no prompt")
    return [task for _, task in sorted(turns, key=lambda turn: turn[0])]


def evaluation_batch(source: str, num_samples: int, base_dir: Path = Path(".")) -> PromptBatch:
    """The fixed samples of an evaluation; sample ids count from 0 under the evaluation's own seed."""
    if source == "shapes:eval":
        rows = shapes.evaluation_set(num_samples)
    else:
        pool = load_prompts(source, base_dir)
        rows = [pool[i % len(pool)] for i in range(num_samples)]
    ids = tuple(range(num_samples))
    return PromptBatch(tuple(row["prompt"] for row in rows), ids, ids, tuple(rows))
