"""A curriculum by pass rate: prompts that the policy passes about half of the time are drawn more often.

Shapes: P prompts that may be drawn, T tasks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowalign.config.curriculum import CurriculumConfig
from flowalign.config.section import ConfigError, nearest
from flowalign.data.prompts import GroupSampler, Row
from flowalign.flow.randomness import Stream, seeded
from flowalign.types import UNTAGGED, PromptBatch, Scores, task_of
from rewards.composite import TOTAL

# What a task and a prompt take over of a surprise, in logits: together Newton's step where p is 1/2, since p (1 - p) is
# 1/4 there. A prompt that was not seen yet has its task's rate.
TASK_STEP, PROMPT_STEP = 1.0, 3.0


class CurriculumSampler(GroupSampler):
    """Draws the groups of an iteration by weight: ``floor + (1 - floor) 4 p (1 - p)``, p a prompt's pass rate.

    A pass rate is the logistic function of two ratings, that of the prompt's task and its own beside it. Both move by
    what surprised in the prompt's last group, as Elo's ratings of players and of exercises do (Pelánek 2016,
    doi:10.1016/j.compedu.2016.03.017). So a prompt that was seen once goes on to follow its task. All begin at 1/2.

    Within a task prompts are drawn by weight, tasks by the mean weight of their prompts times their task weight. The
    draw is systematic sampling: a task, or a prompt, has as many groups of an iteration as its share says, or one more
    or less. It is a function of seed, iteration and ratings, which are those of the scores that it was told of.
    """

    def __init__(self, rows: list[Row], *, curriculum: CurriculumConfig, **options: Any) -> None:
        super().__init__(rows, **options)
        self._curriculum = curriculum
        self._tasks = [task for task in self._by_task if task in self._cycle]
        self._pool = self.all_rows()
        sizes = [len(self._by_task[task]) for task in self._tasks]
        self._task_P = np.repeat(np.arange(len(sizes)), sizes)
        turns = np.array([self._cycle.count(task) for task in self._tasks], np.float64)
        self._turns_P = (turns / sizes)[self._task_P]
        self._places: dict[tuple[int, str], list[int]] = {}
        for place, (task, row) in enumerate(zip(self._task_P.tolist(), self._pool, strict=True)):
            self._places.setdefault((task, row["prompt"]), []).append(place)
        self.restore({})

    def rows(self, iterations: int) -> list[Row]:
        """Return the rows that may be drawn: those of every task that has a weight."""
        return self.all_rows()

    def learn(self, batch: PromptBatch, scores: Scores) -> dict[str, float]:
        """Take over how often the prompts of an iteration were passed; images without a valid score do not count.

        Return the metrics ``curriculum/pass_rate``, the share of its images that passed, and of each task
        ``curriculum/<task>/share`` of the next iteration's groups and ``curriculum/<task>/pass_rate``, the mean
        estimate over its prompts. A task none of whose images ever had a valid score has no such estimate.

        Raises:
            ConfigError: no reward answers the score.
        """
        values, config = self._score(scores), self._curriculum
        counts = values.isfinite()
        passes = counts & (values >= config.threshold)
        of_group: dict[int, list[int]] = {}
        for image, group in enumerate(batch.group_ids):
            of_group.setdefault(group, []).append(image)
        # One after the other: the groups of a task that come together would each move it by the same surprise.
        for _, images in sorted(of_group.items()):
            task = self._tasks.index(task_of(batch.metadata[images[0]]))
            places = self._places[task, batch.prompts[images[0]]]
            valid, passed = int(counts[images].sum()), int(passes[images].sum())
            surprise = (passed - valid * float(self.pass_rates(places)[0])) / len(images)
            self._task_ratings_T[task] += TASK_STEP * surprise
            self._ratings_P[places] += PROMPT_STEP * surprise
            self._seen_P[places] |= valid > 0
        rate = int(passes.sum()) / int(counts.sum()) if bool(counts.any()) else float("nan")
        return {"curriculum/pass_rate": rate, **self._metrics()}

    def pass_rates(self, places: list[int] | slice = slice(None)) -> NDArray[np.float64]:
        """Return the estimated pass rates, (P,), or those at some ``places`` among the prompts."""
        return 1 / (1 + np.exp(-(self._task_ratings_T[self._task_P[places]] + self._ratings_P[places])))

    def weights(self) -> NDArray[np.float64]:
        """Return the weights (P,) that prompts are drawn by; their sum is any."""
        rates, floor = self.pass_rates(), self._curriculum.floor
        return self._turns_P * (floor + (1 - floor) * 4 * rates * (1 - rates))

    def state(self) -> dict[str, Any]:
        """Return the ratings by task and prompt, as plain data; those of prompts that were not seen are left out."""
        own: dict[str, dict[str, float]] = {task: {} for task in self._tasks}
        for (task, prompt), places in self._places.items():
            if self._seen_P[places[0]]:
                own[self._tasks[task]][prompt] = float(self._ratings_P[places[0]])
        ratings = zip(self._tasks, self._task_ratings_T.tolist(), strict=True)
        return {task: {"rating": rating, "prompts": own[task]} for task, rating in ratings}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the ratings of a ``state``; an empty one is the beginning. Prompts that are gone are left out."""
        self._task_ratings_T = np.zeros(len(self._tasks))
        self._ratings_P = np.zeros(len(self._pool))
        self._seen_P = np.zeros(len(self._pool), bool)
        for index, task in enumerate(self._tasks):
            held = state.get(task, {"rating": 0.0, "prompts": {}})
            self._task_ratings_T[index] = held["rating"]
            for prompt, rating in held["prompts"].items():
                places = self._places.get((index, prompt), [])
                self._ratings_P[places], self._seen_P[places] = rating, True

    def _chosen(self, iteration: int) -> list[Row]:
        """Draw by systematic sampling: points evenly apart on the weights, prompts of a task side by side, shuffled."""
        drawn = seeded(self.seed, Stream.CURRICULUM, iteration)
        order = torch.randperm(len(self._pool), generator=drawn).numpy()
        order = order[np.argsort(self._task_P[order], kind="stable")]
        ends = np.cumsum(self.weights()[order])
        first = float(torch.rand((), generator=drawn, dtype=torch.float64))
        points = (np.arange(self.groups) + first) / self.groups * ends[-1]
        places = np.searchsorted(ends, points, side="right").clip(max=len(order) - 1)
        return [self._pool[place] for place in order[places].tolist()]

    def _others(self, task: str, count: int, drawn: Collection[str], generator: torch.Generator) -> list[Row]:
        """Draw by weight among the task's prompts that were not ``drawn`` yet, each once."""
        of_task = np.flatnonzero(self._task_P == self._tasks.index(task)).tolist()
        places: dict[str, list[int]] = {}
        for place in of_task:
            if (prompt := self._pool[place]["prompt"]) not in drawn:
                places.setdefault(prompt, []).append(place)
        if not places:
            return []
        own, rows = self.weights(), list(places.values())
        weights = torch.tensor([own[same].sum() for same in rows], dtype=torch.float64)
        picks = torch.multinomial(weights, min(count, len(rows)), generator=generator)
        return [self._pool[rows[pick][0]] for pick in picks.tolist()]

    def _metrics(self) -> dict[str, float]:
        """Return what each task's prompts are believed to be passed, where any of them was measured, and how large a
        share of the groups they have."""
        counts = np.bincount(self._task_P)
        rates = np.bincount(self._task_P, self.pass_rates()) / counts
        shares = np.bincount(self._task_P, self.weights())
        shares = shares / shares.sum()
        # Prompts that were seen may be gone from the file since; what they told of their task is still there.
        measured = (np.bincount(self._task_P, self._seen_P) > 0) | (self._task_ratings_T != 0)
        names = [f"curriculum/{task or UNTAGGED}" for task in self._tasks]
        found = {f"{name}/pass_rate": float(rates[t]) for t, name in enumerate(names) if measured[t]}
        return found | {f"{name}/share": float(share) for name, share in zip(names, shares, strict=True)}

    def _score(self, scores: Scores) -> torch.Tensor:
        """Return the score that tells what passes, (N,), NaN where it is not valid."""
        known, name = {TOTAL: scores.total, **scores.by_reward}, self._curriculum.score
        if name not in known:
            raise ConfigError("data.curriculum.score", f"no reward answers {name!r}; {nearest(name, known)}")
        return known[name]
