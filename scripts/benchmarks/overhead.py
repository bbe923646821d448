"""How much of an iteration is not the model: 1 - model time / iteration time, as JSON.

Runs the quickstart configuration for a few iterations and times every call into the transformer,
forward and backward, and the decoder. Everything else (noise, log-probs, scoring, packing, the
optimizer, the sync, Ray itself) counts as overhead. ``cluster.backend=local`` so that one process holds
the clock; the Ray run's own iteration time is measured beside it unless ``--no-ray``.

    python scripts/benchmarks/overhead.py --iterations 6
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from flowalign.intake.file import load_align
from flowalign.record.metrics import read_metrics
from flowalign.run.drive import drive
from flowalign.run.fixed import build_run
from flowalign.run.local import LocalBackend

CONFIG = Path("configs/shapes/flow_grpo.yaml")
SKIPPED = 2


class Stopwatch:
    """Sums the wall time of every call of the functions it watches."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def watch(self, owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        setattr(owner, name, timed)


def local(iterations: int) -> dict[str, float]:
    """Model share of the local backend's iterations."""
    import torch

    loaded = load_align(CONFIG, ["cluster.backend=local", "logging.wandb=disabled"])
    backend = LocalBackend(loaded.config, loaded.base_dir)
    run = build_run(loaded.config)
    watch = Stopwatch()
    assert backend.rollouts is not None
    rolls = backend.rollouts.policy
    for network in (rolls.network, backend.learner.network):
        watch.watch(network, "velocity")
    watch.watch(rolls.encoders.vae, "decode")
    watch.watch(torch.autograd, "backward")
    shares, totals = [], []
    backend.sync()
    for iteration in range(iterations):
        watch.seconds, began = 0.0, time.perf_counter()
        plan = run.algorithm.plan(iteration, run.seed)
        assert plan is not None
        collected = backend.collect(run.sampler.batch(iteration), plan, seed=run.seed)
        backend.update(collected.trajectories, collected.scores, iteration)
        backend.sync()
        total = time.perf_counter() - began
        if iteration >= SKIPPED:
            shares.append(watch.seconds / total)
            totals.append(total)
    backend.close()
    return {"model_share": statistics.median(shares), "local_iteration_s": statistics.median(totals)}


def on_ray(iterations: int) -> float:
    """Median iteration time of the same configuration on Ray."""
    with tempfile.TemporaryDirectory() as directory:
        overrides = [
            f"runs_dir={directory}",
            f"iterations={iterations}",
            "evaluation.every=0",
            "logging.wandb=disabled",
        ]
        loaded = load_align(CONFIG, overrides)
        run_dir = drive(loaded.config, loaded.base_dir, Console(quiet=True))
        rows = read_metrics(run_dir / "metrics.jsonl")[SKIPPED:]
    return statistics.median(row["time/iteration_s"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--no-ray", action="store_true")
    options = parser.parse_args()
    result = local(options.iterations)
    model_s = result["model_share"] * result["local_iteration_s"]
    report = {"benchmark": "overhead", **result, "local_overhead": 1 - result["model_share"]}
    if not options.no_ray:
        ray_s = on_ray(options.iterations)
        report |= {"ray_iteration_s": ray_s, "ray_overhead": 1 - model_s / ray_s}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
