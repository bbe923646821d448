"""The intervals of `flowalign compare` beside those of a bootstrap, and how often equal models are told apart.

    flowalign compare shapes runs/a runs/b --out comparison
    python scripts/benchmarks/intervals.py comparison [--resamples 10000] [--comparisons 200]

The bootstrap draws prompts with replacement within each task (percentiles of the mean over tasks). Equal models are
made of the same evaluations: of each prompt the two models change places or not, by a coin, so that neither can be
better. Prints one JSON object: for each model and score, overall, both intervals and the verdicts of such comparisons.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from cells import positive

from flowalign.making.comparison import RECORD
from flowalign.measure.clustered import paired_difference
from flowalign.measure.compared import compare_models
from flowalign.measure.kept import Evaluation, read_evaluation


def overall(first: Evaluation, other: Evaluation, metric: str, level: float, options: argparse.Namespace) -> Any:
    """Both intervals of one model against the first, and what is said of as many equal ones."""
    pairs = [(a, other.rows[file]) for file, a in first.rows.items()]
    scores = [(a, b) for a, b in pairs if None not in (a["scores"].get(metric), b["scores"].get(metric))]
    before, after = (np.array([pair[side]["scores"][metric] for pair in scores], float) for side in (0, 1))
    prompts, tags = [a["prompt"] for a, _ in scores], [a["tag"] for a, _ in scores]
    ours = paired_difference(before, after, prompts, tags, level=level)
    ends = np.percentile(
        resampled(after - before, prompts, tags, options.resamples), 50 + 50 * np.array([-level, level])
    )
    coin, number = np.random.default_rng(1), {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    place = np.array([number[prompt] for prompt in prompts])
    said: Counter[str] = Counter()
    for _ in range(options.comparisons):
        swap = coin.integers(0, 2, len(number))[place] == 1
        pair = np.where(swap, after, before), np.where(swap, before, after)
        said[paired_difference(*pair, prompts, tags).verdict] += 1
    widths = (ends[1] - ends[0]) / (ours.high - ours.low)
    return {
        "difference": round(ours.value, 4),
        "interval": [round(ours.low, 4), round(ours.high, 4)],
        "bootstrap": [round(float(end), 4) for end in ends],
        "width_of_bootstrap_over_ours": round(float(widths), 3),
        "equal_models": dict(said),
    }


def resampled(difference_N: np.ndarray, prompts: list[str], tags: list[str], resamples: int) -> np.ndarray:
    """The mean over tasks of the means of each resample, (resamples,)."""
    rng, own = np.random.default_rng(0), np.array(tags)
    drawn = []
    for tag in dict.fromkeys(tags):
        rows = np.flatnonzero(own == tag)
        names = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts[row] for row in rows))}
        place = np.array([names[prompts[row]] for row in rows])
        sums, counts = np.bincount(place, difference_N[rows]), np.bincount(place)
        index = rng.integers(0, len(names), (resamples, len(names)))
        drawn.append(sums[index].sum(1) / counts[index].sum(1))
    return np.mean(drawn, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--resamples", type=positive, default=10_000)
    parser.add_argument("--comparisons", type=positive, default=200)
    options = parser.parse_args()
    record = json.loads((options.comparison / RECORD).read_text())
    models = [read_evaluation(Path(model["folder"]), model["label"]) for model in record["models"]]
    comparison, found = compare_models(models), dict[str, Any]()
    for other in models[1:]:
        for metric in comparison.metrics:
            found[f"{other.label} {metric}"] = overall(models[0], other, metric, comparison.level, options)
    told = {"confidence": comparison.level, "resamples": options.resamples, "comparisons": options.comparisons}
    print(json.dumps(told | {"overall": found}, indent=1))


if __name__ == "__main__":
    main()
