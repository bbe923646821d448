"""What the looks after an update and the surroundings of rewards cost on the quickstart's model, as JSON.

Medians of ``--repeats`` calls on one thread: the look at weights and moments (once an update), at the average (once an
update, where there is one), entering and leaving a reward's surroundings (once a chunk and reward); and of
``--iterations`` iterations of the quickstart, by which they are divided.

    python scripts/benchmarks/guards.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from flowalign.intake.file import load_align
from flowalign.record.destroyed import fault, fault_of_moments
from flowalign.run.fixed import build_run
from flowalign.run.local import LocalBackend
from flowalign.samples.apart import Apart

CONFIG = Path("configs/shapes/flow_grpo.yaml")


def median_s(work: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    loaded = load_align(CONFIG, ["cluster.backend=local", "logging.wandb=disabled", "learner.engine=torch"])
    config, backend = loaded.config, LocalBackend(loaded.config, loaded.base_dir)
    run = build_run(config)

    def iterate(iteration: int) -> None:
        backend.sync()
        plan = run.algorithm.plan(iteration, run.seed)
        assert plan is not None
        collected = backend.collect(run.sampler.batch(iteration), plan, seed=run.seed)
        backend.update(collected.trajectories, collected.scores, iteration)

    iterations = [median_s(lambda i=i: iterate(i), 1) for i in range(options.iterations)]
    engine = backend.learner.learner.engine
    weights = engine.held()
    torch.set_num_threads(1)
    state = median_s(lambda: fault("", weights) or fault_of_moments(engine.moments()), options.repeats)
    average = median_s(lambda: fault("", weights), options.repeats)
    own = Apart()

    def enter() -> None:
        with own:
            pass

    apart = median_s(enter, options.repeats)
    updates = config.learner.updates_per_iteration * config.learner.epochs
    chunks = -(-len(run.sampler.batch(0).prompts) // config.rollout.chunk_size) * len(config.rewards)
    iteration = statistics.median(iterations)
    backend.close()
    report = {
        "benchmark": "guards",
        "parameters": sum(p.numel() for p in weights.values()),
        "state_ms": 1e3 * state,
        "average_ms": 1e3 * average,
        "apart_ms": 1e3 * apart,
        "updates": updates,
        "chunks": chunks,
        "iteration_s": iteration,
        "state_share": updates * (state + average) / iteration,
        "apart_share": chunks * apart / iteration,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
