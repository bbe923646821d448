"""Chunks through two stages: while one is scored the next is rolled out, and a dead worker costs a repetition."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flowalign.cluster.errors import ObjectLost, WorkerLost
from flowalign.cluster.pool import Pool, fetch
from flowalign.cluster.witness import DEATHS
from flowalign.run.collecting import Request
from flowalign.run.patience import Wait
from flowalign.types import Preview, Scores


def _nothing(text: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Done:
    """What the driver sees of the chunks that were scored as one, their scores, and the seconds that these took."""

    previews: list[Preview]
    scores: Scores
    score_s: float


class Stage:
    """One kind of work: whose it is, what waits for it, a chunk or the first of those that are scored as one, and which
    workers are free.

    ``gives_up_s`` is the time after which a worker that is not stopped would end its work by itself.
    """

    def __init__(self, pool: Pool, work: str, submit: Callable[[Any, int], Any], gives_up_s: float = 0.0) -> None:
        self.pool, self.work, self.submit, self.gives_up_s = pool, work, submit, gives_up_s
        self.waiting: deque[int] = deque()
        self.idle: deque[int] = deque()

    def begin(self) -> None:
        """Let all workers take part that are not being made."""
        made = self.pool.being_made
        self.idle = deque(index for index in range(len(self.pool.actors)) if index not in made)


@dataclass
class Task:
    """A chunk that a worker is at, or the first of those that are scored as one."""

    stage: Stage
    chunk: int
    worker: int
    wait: Wait


class Pipeline:
    """Rolls out and scores the chunks of one batch.

    There is one of ``requests`` for each chunk. Pictures and trajectories lie in the object store: the pictures until
    they are scored, the trajectories as long as ``trajectory_refs``, which are in the order of the chunks.
    ``units`` are the consecutive chunks that are scored as one, once all of them are there.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        units: Sequence[range],
        rollouts: Pool,
        rewards: Pool,
        evaluation: bool,
        max_retries: int,
        score_gives_up_s: float,
    ) -> None:
        count = len(requests)
        self.requests, self._evaluation, self._max_retries = requests, evaluation, max_retries
        self.trajectory_refs: list[Any] = [None] * count
        self._pictures: list[Any] = [None] * count
        self._previews: dict[int, Preview] = {}
        self._done: dict[int, Done] = {}
        self._units = units
        self._unit_of = {chunk: unit for unit in units for chunk in unit}
        self._missing = set(range(count))
        what = "of an evaluation" if evaluation else "of a chunk"
        self._rollout = Stage(rollouts, f"rollout {what}", self._submit_rollout)
        self._score = Stage(rewards, f"scores {what}", self._submit_score, score_gives_up_s)
        self._rollout.waiting.extend(range(count))
        self._running: dict[Any, Task] = {}
        self._failures: Counter[tuple[str, int]] = Counter()

    def run(self, count: Callable[[int, int], None] | None = None, say: Callable[[str], None] = _nothing) -> list[Done]:
        """Return previews and scores, in the order of the units. Tell ``say`` of each that has to be repeated.

        Raises:
            WorkerLost: a chunk lost its worker more than ``max_retries`` times.
        """
        self._say = say
        stages = (self._score, self._rollout)
        for stage in stages:
            stage.begin()
        while True:
            for stage in stages:
                self._dispatch(stage)
            made_again = {ref: stage for stage in stages for ref in stage.pool.reviving}
            if not self._running and not any(stage.waiting for stage in stages):
                break
            before = len(self._done)
            for ref in self._rollout.pool.vigil.step([*self._running, *made_again]):
                if ref in made_again:
                    made_again[ref].idle.append(made_again[ref].pool.revived(ref))
                else:
                    self._finish(ref)
            self._look_for_late()
            if count is not None and len(self._done) > before:
                count(sum(len(self._unit_of[first]) for first in self._done), len(self.requests))
        return [self._done[unit.start] for unit in self._units]

    def make_again(self, lost: ObjectLost) -> None:
        """Make trajectories again that were lost after they were made, with the same bits; raises as ``run`` does."""
        known = [i for i, ref in enumerate(self.trajectory_refs) if ref.hex() == lost.ref]
        self._roll_out_again(known or range(len(self.trajectory_refs)))
        self.run(say=self._say)

    def _roll_out_again(self, chunks: Sequence[int]) -> None:
        self._count_failure(self._rollout, chunks[0], "the node that held what it made is gone")
        self._rollout.waiting.extendleft(reversed(chunks))
        self._missing.update(chunks)

    def _submit_rollout(self, actor: Any, chunk: int) -> Any:
        pictures, trajectories, preview = actor.rollout.options(num_returns=3).remote(self.requests[chunk])
        self._pictures[chunk] = pictures
        if not self._evaluation:
            self.trajectory_refs[chunk] = trajectories
        return preview

    def _submit_score(self, actor: Any, chunk: int) -> Any:
        return actor.score.remote(self._evaluation, *(self._pictures[i] for i in self._unit_of[chunk]))

    def _dispatch(self, stage: Stage) -> None:
        while stage.waiting and stage.idle:
            chunk, worker = stage.waiting.popleft(), stage.idle.popleft()
            task = Task(stage, chunk, worker, stage.pool.vigil.wait(stage.work))
            self._running[stage.submit(stage.pool.actors[worker], chunk)] = task

    def _finish(self, ref: Any) -> None:
        task = self._running.pop(ref)
        stage, chunk, unit = task.stage, task.chunk, self._unit_of[task.chunk]
        try:
            result = fetch(ref)
            if stage is self._rollout:
                self._previews[chunk], seconds = result, result.seconds
                self._missing.discard(chunk)
                if self._missing.isdisjoint(unit) and unit.start not in self._done:
                    self._score.waiting.append(unit.start)
            else:
                scores, seconds = result
                self._done[chunk] = Done([self._previews[i] for i in unit], scores, seconds)
                for i in unit:
                    self._pictures[i] = None
            task.wait.answered(seconds)
        except DEATHS as error:
            self._repeat(task, stage.pool.why(task.worker, error))
            return
        except ObjectLost:
            self._roll_out_again(unit if stage is self._score else [chunk])  # nobody says which of them is gone
        stage.idle.append(task.worker)

    def _repeat(self, task: Task, why: str) -> None:
        """Give the chunk of a worker that is dead, or counts as dead, to another, and make the worker again."""
        self._count_failure(task.stage, task.chunk, why)
        task.stage.pool.remake(task.worker, why)
        task.stage.waiting.appendleft(task.chunk)

    def _look_for_late(self) -> None:
        """Say who is slow, and end who is late; a reward that is not stopped has until its own deadline has passed."""
        for pool in (self._rollout.pool, self._score.pool):
            pool.look_after_revivals()
        for ref, task in list(self._running.items()):
            pool, wait = task.stage.pool, task.wait
            if wait.became_slow():
                over = f"{pool.name(task.worker)} {wait.so_far()} over {self._said(task.stage, task.chunk)}"
                self._say(f"late: {over}; if it goes on so it is ended and made again at {wait.end()}")
            if wait.late and (wait.waited_s >= task.stage.gives_up_s or pool.stopped(task.worker)):
                stopped = ", since its process is stopped" if pool.stopped(task.worker) else ""
                del self._running[ref]
                self._repeat(task, wait.why() + stopped)

    def _said(self, stage: Stage, chunk: int) -> str:
        """Return ``chunk 2 of 6``; for several that are scored as one, ``chunks 1 to 3 of 6``."""
        unit = self._unit_of[chunk]
        several = stage is self._score and len(unit) > 1
        return f"chunk{f's {unit[0] + 1} to {unit[-1] + 1}' if several else f' {chunk + 1}'} of {len(self.requests)}"

    def _count_failure(self, stage: Stage, chunk: int, why: str) -> None:
        kind, said = stage.pool.kind, self._said(stage, chunk)
        self._failures[kind, chunk] += 1
        times = self._failures[kind, chunk]
        if times > self._max_retries:
            raise WorkerLost(
                f"the {kind} worker died {times} times over {said} "
                f"(cluster.max_task_retries={self._max_retries}), the last time so: {why}"
            )
        self._say(
            f"retried: the {kind} worker was lost over {said} ({why}); the chunk is "
            f"made again, with the same bits ({times} of at most {self._max_retries} times)"
        )
