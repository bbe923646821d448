"""Offline Diffusion-DPO against the base: pairs from ``make-preferences``, then the win rate by a held-out reward.

Both models draw the evaluation prompts with the same noise; the aligned one wins where PickScore, which no pair has
seen, rates its image higher, and a draw counts half. The interval of one seed is Wilson's; that of all together
resamples the evaluation's samples, each with its outcomes under every seed, for they share prompts and noise.

    python scripts/benchmarks/preferences.py --pairs 2000 --seeds 0,1,2 --iterations 150
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from cells import HELD_OUT, RESULTS, ROOT, align, flowalign, machine, positive, write

from flowalign.config.alignment import AlignConfig
from flowalign.config.sections import RewardConfig
from flowalign.intake.file import load_align
from flowalign.intake.paths import resolve_reward
from flowalign.measure.evaluate import evaluate_checkpoint
from flowalign.samples.sampled import sampled_model

PIPELINE = ROOT / "flowalign" / "shapes" / "assets" / "pipeline"


def judged(path: Path, config: AlignConfig, which: Any, samples: int) -> tuple[np.ndarray, dict[str, float]]:
    """The held-out scores (N,) of a model's evaluation images, and its GenEval."""
    held_out = resolve_reward(RewardConfig.model_validate(HELD_OUT), ROOT, "held out")
    scored = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"scorer": held_out})})
    rows = evaluate_checkpoint(sampled_model(path, scored, which=which), num_samples=samples).rows
    metrics = evaluate_checkpoint(sampled_model(path, config, which=which), num_samples=samples).metrics
    return np.array([row["score"] for row in rows]), metrics


def wilson(wins: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a proportion (Wilson 1927)."""
    p, scale = wins / count, 1 + z * z / count
    middle, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return (middle - half) / scale, (middle + half) / scale


def resampled(outcomes_SN: np.ndarray, draws: int = 10000) -> tuple[float, float]:
    """Interval of the mean outcome over seeds and samples: percentiles over resampled columns."""
    means = outcomes_SN.mean(0)
    index = np.random.default_rng(0).integers(0, len(means), (draws, len(means)))
    low, high = np.percentile(means[index].mean(1), [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--samples", type=int, default=1200)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "preferences")
    options = parser.parse_args()
    work = options.work_dir.resolve()
    pairs = work / "pairs"
    if not (pairs / "preferences.json").is_file():
        asked = ["make-preferences", str(PIPELINE), "mode=partial", "detector=palette", "--reward", "geneval"]
        flowalign([*asked, "--pairs", str(options.pairs), "--out", str(pairs)], options.threads, work / "pairs.log")
    keys = {
        "data.preferences": str(pairs),
        "iterations": options.iterations,
        "checkpoint.every": options.iterations,
        "evaluation.every": options.iterations,
    }
    config = load_align(
        ROOT / "configs/shapes/dpo.yaml", [f"cluster.threads={options.threads}", *_written(pairs)]
    ).config
    before, base = judged(PIPELINE, config, "model", options.samples)
    outcomes, runs = [], []
    for seed in options.seeds:
        run = align("dpo", {**keys, "seed": seed}, options.threads, work, f"dpo-seed{seed}")
        after, metrics = judged(run, config, "ema", options.samples)
        outcome = np.where(after == before, 0.5, after > before)
        outcomes.append(outcome)
        runs.append(
            {"seed": seed, "win_rate": outcome.mean(), "interval": wilson(outcome.sum(), len(outcome)), **metrics}
        )
    stacked = np.stack(outcomes)
    report = {
        "machine": machine(options.threads),
        "pairs": json.loads((pairs / "preferences.json").read_text()) | {"checkpoint": "shapes"},
        "iterations": options.iterations,
        "algorithm": config.algorithm,
        "learning_rate": config.learner.optimizer.learning_rate,
        "base": base,
        "seeds": runs,
        "win_rate": float(stacked.mean()),
        "interval": resampled(stacked),
    }
    write(RESULTS / "preferences.json", report)
    print(json.dumps(report))


def _written(pairs: Path) -> list[str]:
    return [f"data.preferences={pairs}", "cluster.backend=local", "learner.engine=torch"]


if __name__ == "__main__":
    main()
