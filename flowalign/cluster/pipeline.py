"""Chunks through two stages: while one is scored the next is rolled out, and a dead worker costs a repetition."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayTaskError

from flowalign.cluster.errors import WorkerLost
from flowalign.cluster.pool import DEATHS, Pool, fetch
from flowalign.types import PromptBatch, Rollout, Scores


def _nothing(text: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Done:
    """A chunk that went through both stages, and the seconds each took."""

    rollout: Rollout
    scores: Scores
    rollout_s: float
    score_s: float


class Stage:
    """One kind of work on chunks: whose it is, which chunks wait for it, which workers are free."""

    def __init__(self, pool: Pool, submit: Callable[[Any, int], Any]) -> None:
        self.pool, self.submit = pool, submit
        self.waiting: deque[int] = deque()
        self.idle = deque(range(len(pool.actors)))


class Pipeline:
    """Rolls out and scores the chunks of one batch.

    Rollouts go from worker to worker through the object store. ``refs`` are those of the rollouts, in
    the order of the chunks, for whoever needs them next.
    """

    def __init__(
        self,
        chunks: Sequence[PromptBatch],
        rollouts: Pool,
        rewards: Pool,
        rollout_args: tuple[Any, ...],
        evaluation: bool,
        max_retries: int,
    ) -> None:
        count = len(chunks)
        self.chunks, self._rollout_args, self._evaluation = chunks, rollout_args, evaluation
        self._max_retries = max_retries
        self.refs: list[Any] = [None] * count
        self._rollout_s = [0.0] * count
        self._done: dict[int, Done] = {}
        self._rollout, self._score = Stage(rollouts, self._submit_rollout), Stage(rewards, self._submit_score)
        self._rollout.waiting.extend(range(count))
        self._running: dict[Any, tuple[Stage, int, int]] = {}
        self._failures: Counter[tuple[str, int]] = Counter()

    def run(self, count: Callable[[int, int], None] | None = None, say: Callable[[str], None] = _nothing) -> list[Done]:
        """Rollouts and scores, in the order of the chunks; ``say`` is told of each that has to be repeated.

        Raises:
            WorkerLost: a chunk lost its worker more than ``max_retries`` times.
        """
        self._say = say
        while True:
            for stage in (self._score, self._rollout):
                self._dispatch(stage)
            if not self._running:
                break
            done, _ = ray.wait(list(self._running), num_returns=1)
            before = len(self._done)
            self._finish(done[0])
            if count is not None and len(self._done) > before:
                count(len(self._done), len(self.chunks))
        return [self._done[chunk] for chunk in range(len(self.chunks))]

    def _submit_rollout(self, actor: Any, chunk: int) -> Any:
        batch = self.chunks[chunk]
        self.refs[chunk], seconds = actor.rollout.options(num_returns=2).remote(batch, *self._rollout_args)
        return seconds

    def _submit_score(self, actor: Any, chunk: int) -> Any:
        return actor.score.remote(self.refs[chunk], self._evaluation)

    def _dispatch(self, stage: Stage) -> None:
        while stage.waiting and stage.idle:
            chunk, worker = stage.waiting.popleft(), stage.idle.popleft()
            self._running[stage.submit(stage.pool.actors[worker], chunk)] = (stage, chunk, worker)

    def _finish(self, ref: Any) -> None:
        stage, chunk, worker = self._running.pop(ref)
        try:
            result = _get(ref)
            if stage is self._rollout:
                self._rollout_s[chunk] = result
                self._score.waiting.append(chunk)
            else:
                scores, seconds = result
                self._done[chunk] = Done(_get(self.refs[chunk]), scores, self._rollout_s[chunk], seconds)
        except DEATHS as error:
            why = stage.pool.why(worker, error)
            self._count_failure(stage, chunk, why)
            stage.pool.replace(worker, why)
            stage.waiting.appendleft(chunk)
        except ObjectLostError:
            self._count_failure(self._rollout, chunk, "the node that held what it made is gone")
            self._rollout.waiting.appendleft(chunk)
        stage.idle.append(worker)

    def _count_failure(self, stage: Stage, chunk: int, why: str) -> None:
        kind = stage.pool.kind
        self._failures[kind, chunk] += 1
        times = self._failures[kind, chunk]
        if times > self._max_retries:
            raise WorkerLost(
                f"the {kind} worker died {times} times over chunk {chunk + 1} of {len(self.chunks)} "
                f"(cluster.max_task_retries={self._max_retries}), the last time so: {why}"
            )
        self._say(
            f"retried: the {kind} worker was lost over chunk {chunk + 1} of {len(self.chunks)} ({why}); the chunk is "
            f"made again, with the same bits ({times} of at most {self._max_retries} times)"
        )


def _get(ref: Any) -> Any:
    """A result, or the exception of its worker; a lost object among its arguments is an ObjectLostError."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, ObjectLostError):
            raise error.cause from None
        return fetch(ref)
