"""A whole run as pseudo-code over protocols; knows neither Ray, nor an algorithm's name, nor what is learned from."""

from __future__ import annotations

import time

from flowalign.run.clock import Clock
from flowalign.run.protocols import Backend, Collected, Journal, Run
from flowalign.run.refill import refilled
from flowalign.samples.scoring import require_valid, reward_metrics
from flowalign.types import SamplingPlan


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
        collected, learned = None, {}
        if plan is not None:
            collected, learned = _collect(run, backend, journal, plan, iteration)
        clock.lap("collect_s")
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


def _collect(
    run: Run, backend: Backend, journal: Journal, plan: SamplingPlan, iteration: int
) -> tuple[Collected, dict[str, float]]:
    """Return the samples of an iteration, and what there is to say of how their prompts are drawn."""
    place = {"seed": run.seed, "count": journal.doing("rollout")}
    collected, drawn = backend.collect(run.sampler.batch(iteration), plan, **place), {}
    if run.algorithm.needs.scores:
        require_valid(collected.scores, run.min_valid_fraction)
    if run.refill:
        collected, drawn = refilled(collected, run, backend, plan, iteration, journal.doing)
    return collected, {**drawn, **run.sampler.learn(collected.batch, collected.scores)}


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
