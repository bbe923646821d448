"""A whole run as pseudo-code over protocols; knows neither Ray, nor an algorithm's name, nor what is learned from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from flowalign.algorithm import Algorithm
from flowalign.run.clock import Clock
from flowalign.samples.scoring import require_valid, reward_metrics
from flowalign.types import Preview, PromptBatch, SamplingPlan, Scores, Update

Count = Callable[[int, int], None]  # (finished chunks, their number)


@dataclass(frozen=True)
class Collected:
    """Samples of one iteration with their scores, as the driver knows them.

    ``batch`` has a row an image. ``trajectories`` are for `Backend.update` alone, which knows what they are: chunks, or
    where they lie. Seconds of work are means over the workers of a kind.
    """

    batch: PromptBatch
    scores: Scores
    preview: Preview
    trajectories: Any
    rollout_s: float
    score_s: float


NOTHING = Collected(
    batch=PromptBatch((), (), (), ()),
    scores=Scores({}, torch.zeros(0), torch.zeros(0, dtype=torch.bool)),
    preview=Preview(np.zeros((0, 1, 1, 3), np.uint8), {}),
    trajectories=None,
    rollout_s=0.0,
    score_s=0.0,
)


class Backend(Protocol):
    """The place of the work: this process or Ray actors. Both compute the same bits."""

    def collect(
        self, batch: PromptBatch, plan: SamplingPlan, *, seed: int, evaluation: bool = False, count: Count | None = None
    ) -> Collected: ...  # `NOTHING` in those processes of a run that make nothing

    # `trajectories` are those of a `Collected`; None: from what the learner has on disk.
    def update(self, trajectories: Any, scores: Scores | None, iteration: int) -> Update: ...

    # Every rollout worker acknowledges the weights, or the run stops; for evaluation those of `evaluation.weights`.
    def sync(self, evaluation: bool = False) -> None: ...

    # The losses on what is kept for that, where there is something.
    def validate(self) -> dict[str, float]: ...

    def parameters(self) -> tuple[int, int]: ...  # trained, and all

    def state(self) -> list[dict[str, Any]]: ...  # one entry a rank of the learner

    def restore(self, states: list[dict[str, Any]]) -> str | None: ...  # a line where the ranks shared it otherwise

    def restart_learner(self) -> None: ...  # after `RankLost`; `restore` and `sync` follow

    def close(self) -> None: ...


class Sampler(Protocol):
    """The samples of each iteration: a function of seed, iteration, and the scores of those before."""

    def batch(self, iteration: int) -> PromptBatch: ...

    # Takes over what an iteration scored, and returns metrics, where later ones depend on it.
    def learn(self, batch: PromptBatch, scores: Scores) -> dict[str, float]: ...

    def state(self) -> dict[str, Any]: ...  # plain data for a checkpoint, empty where nothing was learned

    def restore(self, state: Mapping[str, Any]) -> None: ...  # an empty one is the beginning of the run


class Journal(Protocol):
    """The traces of a run: metrics, images, checkpoints, and what it says meanwhile."""

    # `begun` is the iteration of something that may be long and is said where no bar shows it.
    def doing(self, what: str, begun: int | None = None) -> Count: ...

    def begin(self) -> None: ...  # before the first iteration; from here on there is something to keep

    def iteration(self, iteration: int, metrics: dict[str, float], collected: Collected | None) -> None: ...

    def evaluation(self, iteration: int, collected: Collected, seconds: float) -> dict[str, float]: ...

    # `drawn` is the sampler's state.
    def checkpoint(
        self, iteration: int, backend: Backend, metrics: dict[str, float], drawn: Mapping[str, Any]
    ) -> None: ...

    def due(self, what: str, iteration: int) -> bool: ...

    @property
    def stopping(self) -> bool: ...  # somebody or something asked the run to end after this iteration


@dataclass(frozen=True)
class Run:
    """The fixed parts of a run.

    ``sized`` has the algorithm on the schedule of each image size, (height, width), other than the model's own.
    """

    algorithm: Algorithm
    sampler: Sampler
    evaluation: tuple[PromptBatch, SamplingPlan, int] | None
    iterations: int
    seed: int
    min_valid_fraction: float
    sized: tuple[tuple[tuple[int, int], Algorithm], ...] = ()
    evaluates_ema: bool = False

    def plan(self, iteration: int) -> SamplingPlan | None:
        """Return how the samples of an iteration are made, at each size; None: there are none."""
        plan = self.algorithm.plan(iteration, self.seed)
        if plan is None or not self.sized:
            return plan
        own = ((size, algorithm.plan(iteration, self.seed)) for size, algorithm in self.sized)
        return replace(plan, by_size=tuple((size, made.sigmas) for size, made in own if made is not None))


def iterate(run: Run, backend: Backend, journal: Journal, start: int = 0) -> int:
    """Roll out, score, learn and sync, until ``run.iterations`` or ``journal.stopping``; return the last iteration.

    Iterations are counted from 1 once done. An algorithm without a sampling plan learns from what lies on disk: nothing
    is rolled out but for evaluations.
    """
    backend.sync()
    if start == 0:
        _evaluate(run, backend, journal, 0)
    journal.begin()
    for iteration in range(start, run.iterations):
        clock = Clock()
        plan = run.plan(iteration)
        collected = None
        if plan is not None:
            count = journal.doing("rollout")
            collected = backend.collect(run.sampler.batch(iteration), plan, seed=run.seed, count=count)
        clock.lap("collect_s")
        if collected is not None and run.algorithm.needs.scores:
            require_valid(collected.scores, run.min_valid_fraction)
        learned = {} if collected is None else run.sampler.learn(collected.batch, collected.scores)
        made, scores = (None, None) if collected is None else (collected.trajectories, collected.scores)
        journal.doing("learning")
        update = backend.update(made, scores, iteration)
        clock.lap("learn_s")
        done = iteration + 1
        if collected is not None or journal.due("evaluation", done):
            backend.sync()
        clock.lap("sync_s")
        metrics = {**_measured(collected, clock), **learned, **update.metrics}
        if journal.due("evaluation", done):
            metrics |= _evaluate(run, backend, journal, done)
        if journal.due("validation", done):
            metrics |= _validate(backend, journal, done)
        journal.iteration(done, metrics, collected)
        stopping = journal.stopping  # a request that comes later must not skip its checkpoint
        if stopping or journal.due("checkpoint", done):
            journal.checkpoint(done, backend, metrics, run.sampler.state())
            stopping = stopping or journal.stopping
        if stopping:
            return done
    return run.iterations


def _measured(collected: Collected | None, clock: Clock) -> dict[str, float]:
    if collected is None:
        return clock.metrics()
    rewards = reward_metrics(collected.scores) if collected.scores.by_reward else {}
    return {**rewards, **clock.metrics((collected.rollout_s, collected.score_s, len(collected.batch)))}


def _validate(backend: Backend, journal: Journal, iteration: int) -> dict[str, float]:
    began = time.monotonic()
    journal.doing("validation", iteration)
    return {**backend.validate(), "time/validation_s": time.monotonic() - began}


def _evaluate(run: Run, backend: Backend, journal: Journal, iteration: int) -> dict[str, float]:
    if run.evaluation is None:
        return {}
    began = time.monotonic()
    batch, plan, seed = run.evaluation
    count = journal.doing("evaluation", iteration)
    if run.evaluates_ema:
        backend.sync(evaluation=True)
    collected = backend.collect(batch, plan, seed=seed, evaluation=True, count=count)
    metrics = journal.evaluation(iteration, collected, time.monotonic() - began)
    if run.evaluates_ema:
        backend.sync()
    return metrics
