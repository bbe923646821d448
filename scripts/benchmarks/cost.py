"""What an iteration costs against its groups, its steps, the size of its images and the length of its text.

Each axis is walked alone from configs/shapes/flow_grpo.yaml, in one process on one thread, whose CPU seconds are those
of an idle machine whatever else runs. The values of an axis are measured in turn, round after round. One JSON file:
seconds of rolling out, scoring with it, and of learning, medians over rounds with the least and the most; and of each
axis a line through them, ``base_s + slope_s * x``, with the share of the variance that it explains (``r2``), where x is
what the cost should be linear in: images, steps, tokens of an image, tokens of its text.

An image has (side / 16)^2 tokens here and its text 16 beside the T5 part. Attention grows with the square of all of
them; at these lengths it is a small part.

    python scripts/benchmarks/cost.py
    python scripts/benchmarks/cost.py --axes groups,steps --rounds 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from cells import RESULTS, ROOT, local, machine, positive, write

from flowalign.intake.file import load_align
from flowalign.run.fixed import build_run
from flowalign.run.local import LocalBackend

CONFIG = ROOT / "configs" / "shapes" / "flow_grpo.yaml"
PATCH = 16  # pixels of a token's side


class Axis(NamedTuple):
    """The values that are walked, what they set, and what the cost should be linear in."""

    values: Sequence[int]
    keys: Any
    linear_in: Any


FEWER = {"data.groups_per_iteration": 6, "rollout.chunk_size": 24, "learner.micro_batch_size": 24}
AXES = {
    "groups": Axis((6, 12, 24, 48), lambda v: {"data.groups_per_iteration": v}, lambda v: 8 * v),
    "steps": Axis((5, 10, 20, 40), lambda v: {"algorithm.num_steps": v, "algorithm.window.stop": 5}, lambda v: v),
    "size": Axis(
        (32, 64, 96, 128), lambda v: {"model.height": v, "model.width": v, **FEWER}, lambda v: (v // PATCH) ** 2
    ),
    "text": Axis((2, 16, 64, 128), lambda v: {"model.max_sequence_length": v, **FEWER}, lambda v: v),
}


class Measured:
    """A run of one configuration whose iterations are asked for one by one."""

    def __init__(self, overrides: Mapping[str, Any]) -> None:
        more = {"evaluation.every": 0, "checkpoint.best_metric": "reward/total/mean", "checkpoint.keep_best": 0}
        more["rewards"] = ["jpeg"]  # of which no group is silent: every image is learned from
        loaded = load_align(CONFIG, local({**more, **overrides}, 1, Path("runs"), "cost"))
        self.run = build_run(loaded.config)
        self.backend = LocalBackend(loaded.config, loaded.base_dir)
        self.backend.sync()
        self.iteration = 0

    def seconds(self) -> tuple[float, float]:
        """Return the CPU seconds of collecting and of learning of the next iteration."""
        plan = self.run.plan(self.iteration)
        assert plan is not None
        began = time.process_time()
        made = self.backend.collect(self.run.sampler.batch(self.iteration), plan, seed=self.run.seed)
        middle = time.process_time()
        self.backend.update(made.trajectories, made.scores, self.iteration)
        self.backend.sync()
        self.iteration += 1
        return middle - began, time.process_time() - middle


def line(x: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """The line through the seconds by least squares, and how much of their variance it explains."""
    slope, base = np.polyfit(x, seconds, 1)
    left = np.asarray(seconds) - (base + slope * np.asarray(x))
    return {"base_s": float(base), "slope_s": float(slope), "r2": float(1 - left.var() / np.var(seconds))}


def walk(axis: Axis, rounds: int) -> dict[str, Any]:
    runs = {value: Measured(axis.keys(value)) for value in axis.values}
    found: dict[int, list[tuple[float, float]]] = {value: [] for value in axis.values}
    for turn in range(rounds + 1):
        for value, run in runs.items():
            seconds = run.seconds()
            if turn:  # the first warms up
                found[value].append(seconds)
    rows = []
    for value, seconds in found.items():
        row: dict[str, Any] = {"value": value, "x": axis.linear_in(value)}
        for name, own in zip(("collect_s", "learn_s"), zip(*seconds, strict=True), strict=True):
            row |= {name: round(statistics.median(own), 4), f"{name}_range": [round(min(own), 4), round(max(own), 4)]}
        rows.append(row)
    x = [row["x"] for row in rows]
    return {"rows": rows, **{name: line(x, [row[name] for row in rows]) for name in ("collect_s", "learn_s")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", type=lambda text: text.split(","), default=list(AXES), help="names, with commas")
    parser.add_argument("--rounds", type=positive, default=5, help="iterations of each value, beside one that warms up")
    parser.add_argument("--out", type=Path, default=RESULTS / "cost.json")
    options = parser.parse_args()
    if unknown := set(options.axes) - set(AXES):
        parser.error(f"--axes: no axis {min(unknown)!r}; there are {', '.join(AXES)}")
    torch.set_num_threads(1)
    found = {"machine": machine(1), "rounds": options.rounds, "axes": {}}
    for name in options.axes:
        found["axes"][name] = walk(AXES[name], options.rounds)
        write(options.out, found)
        print(json.dumps({name: found["axes"][name]}), flush=True)


if __name__ == "__main__":
    main()
