"""Prompts and groups: which samples an iteration makes, as a function of (seed, iteration)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from flowalign.config.prompts import Prompts
from flowalign.data.promptsets import PromptsError as PromptsError
from flowalign.data.promptsets import Row as Row
from flowalign.data.promptsets import load_prompts as load_prompts
from flowalign.data.promptsets import placed_prompts as placed_prompts
from flowalign.flow.randomness import Stream, seeded
from flowalign.shapes import prompts as shapes
from flowalign.types import PromptBatch, Scores, task_of

REFILL_IDS = 1 << 40  # what samples and groups of a refill count from, beyond those of any run's iterations
MOST_REFILLS = 16  # of an iteration, as the configuration bounds them


class GroupSampler:
    """Draws the groups of an iteration: tasks (``task``, else ``tag``) in turn, by weight, then a prompt of the task.

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
            self._by_task.setdefault(task_of(row), []).append(row)
        self._cycle = task_cycle(rows, task_weights or {})
        self.prompts = [row["prompt"] for row in rows]
        self.groups, self.group_size, self.seed = groups, group_size, seed

    def batch(self, iteration: int) -> PromptBatch:
        """Return ``groups * group_size`` samples of an iteration, group after group."""
        return self._groups(self._chosen(iteration), iteration * self.groups)

    def _groups(self, chosen: Sequence[Row], first: int) -> PromptBatch:
        """Return a group of samples for each row, groups and samples counted from the group ``first``."""
        size = self.group_size
        begin = first * size
        return PromptBatch(
            prompts=tuple(row["prompt"] for row in chosen for _ in range(size)),
            group_ids=tuple(first + g for g in range(len(chosen)) for _ in range(size)),
            sample_ids=tuple(range(begin, begin + len(chosen) * size)),
            metadata=tuple(row for row in chosen for _ in range(size)),
        )

    def refill(self, iteration: int, draw: int, tasks: Sequence[str], drawn: Collection[str]) -> PromptBatch:
        """Return one more group for each of ``tasks``, in the ``draw`` of an iteration beside its first, from 1 on.

        Their prompts are none of those ``drawn`` already, as long as the task has others. Of a task without any no
        group is drawn, so that the batch may be shorter, or empty.
        """
        chosen: list[Row] = []
        for task in dict.fromkeys(tasks):
            index = list(self._by_task).index(task)
            generator = seeded(self.seed, Stream.REFILL, iteration, draw, index)
            chosen += self._others(task, tasks.count(task), drawn, generator)
        place = iteration * MOST_REFILLS + draw - 1
        return self._groups(chosen, REFILL_IDS + place * self.groups)

    def _others(self, task: str, count: int, drawn: Collection[str], generator: torch.Generator) -> list[Row]:
        """Return rows of a task, each of another prompt and none of one that was ``drawn``, as many as there are and at
        most ``count``. A row that is there several times, as by its weight, comes once."""
        pool = [row for row in self._by_task[task] if row["prompt"] not in drawn]
        order = (pool[i] for i in torch.randperm(len(pool), generator=generator).tolist())
        first: dict[str, Row] = {}
        for row in order:
            first.setdefault(row["prompt"], row)
        return list(first.values())[:count]

    def rows(self, iterations: int) -> list[Row]:
        """Return the rows that so many iterations draw, task after task, each once."""
        passes, place = divmod(iterations * self.groups, len(self._cycle))
        found: list[Row] = []
        for task in dict.fromkeys(self._cycle):
            pool = self._by_task[task]
            turns = passes * self._cycle.count(task) + self._cycle[:place].count(task)
            found += pool if turns >= len(pool) else [pool[i] for i in self._order(task, 0)[:turns].tolist()]
        return found

    def all_rows(self) -> list[Row]:
        """Return the rows that any iteration may draw: those of every task that has a weight."""
        return [row for task, own in self._by_task.items() if task in self._cycle for row in own]

    def learn(self, batch: PromptBatch, scores: Scores) -> dict[str, float]:
        """Learn nothing of what an iteration scored: the draw is a function of (seed, iteration)."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return nothing for a checkpoint to keep."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""

    def _chosen(self, iteration: int) -> list[Row]:
        """Return the row of each group of an iteration."""
        return [self._pick(iteration * self.groups + g) for g in range(self.groups)]

    def _pick(self, turn: int) -> Row:
        passes, place = divmod(turn, len(self._cycle))
        task = self._cycle[place]
        used = passes * self._cycle.count(task) + self._cycle[:place].count(task)
        pool = self._by_task[task]
        return pool[int(self._order(task, used // len(pool))[used % len(pool)])]

    def _order(self, task: str, walk: int) -> torch.Tensor:
        """Return the order of a task's prompts on their ``walk``, counted from 0."""
        index = list(self._by_task).index(task)
        drawn = seeded(self.seed, Stream.PROMPT_ORDER, index, walk)
        return torch.randperm(len(self._by_task[task]), generator=drawn)


def task_cycle(rows: list[Row], weights: Mapping[str, int]) -> list[str]:
    """Return the order in which tasks have their turns: each as often as its weight, spread out.

    Equal ones come in file order.

    Raises:
        PromptsError: a weight for a task that no prompt has, or nothing but zeros.
    """
    tasks = dict.fromkeys((task_of(row) for row in rows), 1)
    if unknown := sorted(weights.keys() - tasks.keys()):
        has = f"have: {', '.join(tasks)}" if any(tasks) else "have no tasks, which a column `task` names"
        raise PromptsError(f"data.task_weights: no prompt has the task {unknown[0]!r}; the prompts {has}")
    turns = [((k + 0.5) / n, task) for task, n in (tasks | dict(weights)).items() for k in range(n)]
    if not turns:
        raise PromptsError("data.task_weights: all weights are 0, which leaves no prompt")
    return [task for _, task in sorted(turns, key=lambda turn: turn[0])]


def evaluation_batch(source: Prompts, num_samples: int) -> PromptBatch:
    """Return the fixed samples of an evaluation; sample ids count from 0 under the evaluation's own seed."""
    if source == "shapes:eval":
        rows = shapes.evaluation_set(num_samples)
    else:
        pool = load_prompts(source)
        rows = [pool[i % len(pool)] for i in range(num_samples)]
    ids = tuple(range(num_samples))
    return PromptBatch(tuple(row["prompt"] for row in rows), ids, ids, tuple(rows))
