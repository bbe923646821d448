"""Two rollout workers on Ray against two plain processes: images a second, rolled out, decoded and scored.

    python scripts/benchmarks/workers.py --turns 7 --out scripts/benchmarks/results/workers.json

Both sides make the images of configs/shapes/flow_grpo.yaml in chunks of one size, each process on one thread. A plain
process is one of the local backend with half of the groups and nothing to wait for; the two begin together, and the
later one counts. On Ray the driver shares the chunks out, and a third process scores. Sides take turns; one turn of
each warms up. Prints one JSON object: images a second by side and the ratio, medians with the least and the most of
all turns. Nothing else may run beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cells import ROOT, local, machine, positive, write
from overhead import summary

from flowalign.cluster.ray_backend import RayBackend
from flowalign.config.alignment import AlignConfig
from flowalign.intake.file import load_align
from flowalign.run.fixed import build_run
from flowalign.run.local import LocalBackend

CONFIG = ROOT / "configs" / "shapes" / "flow_grpo.yaml"
SIDES = ("workers", "processes")
Collect = Callable[[int], None]


def configured(groups: int, chunk: int, **more: Any) -> AlignConfig:
    keys = {"evaluation.every": 0, "checkpoint.best_metric": "reward/total/mean", "checkpoint.keep_best": 0}
    keys |= {"data.groups_per_iteration": groups, "rollout.chunk_size": chunk, **more}
    return load_align(CONFIG, local(keys, 1, Path("runs"), "workers")).config


def images_of(config: AlignConfig) -> int:
    return config.data.groups_per_iteration * config.algorithm["group_size"]


def collecting(backend: RayBackend | LocalBackend, config: AlignConfig) -> Collect:
    """Give what rolls out and scores the images of an iteration."""
    run = build_run(config)
    backend.sync()

    def collect(iteration: int) -> None:
        plan = run.plan(iteration)
        assert plan is not None
        backend.collect(run.sampler.batch(iteration), plan, seed=run.seed)

    return collect


def plain(groups: int, chunk: int) -> None:
    """Make the images of an iteration for every line of standard input, and answer when they are there."""
    torch.set_num_threads(1)
    config = configured(groups, chunk)
    collect = collecting(LocalBackend(config, CONFIG.parent), config)
    print("ready", flush=True)
    for line in sys.stdin:
        collect(int(line))
        print("made", flush=True)


@contextmanager
def processes(count: int, groups: int, chunk: int) -> Iterator[Collect]:
    """Give what makes the images of an iteration in ``count`` plain processes of so many groups each."""
    command = [sys.executable, __file__, "--plain", "--groups", str(groups), "--chunk", str(chunk)]
    pipe: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    started: list[Any] = [
        subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipe) for _ in range(count)
    ]

    def await_all(word: str) -> None:
        for process in started:
            while (said := process.stdout.readline()) != f"{word}\n":
                if not said:
                    raise SystemExit(f"a plain process ended with {process.wait()}")

    def collect(iteration: int) -> None:
        for process in started:
            process.stdin.write(f"{iteration}\n")
        await_all("made")

    try:
        await_all("ready")
        yield collect
    finally:
        for process in started:
            process.stdin.close()
            process.wait()


def timed(collect: Collect, iteration: int) -> float:
    began = time.perf_counter()
    collect(iteration)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=positive, default=5)
    parser.add_argument("--workers", type=positive, default=2, help="and as many plain processes, each on one core")
    parser.add_argument("--groups", type=positive, default=12, help="of a worker in a turn; a group is 8 images")
    parser.add_argument("--chunk", type=positive, default=48, help="images of a pass")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        return plain(options.groups, options.chunk)
    torch.set_num_threads(1)
    more = {"cluster.backend": "ray", "cluster.rollout_workers": options.workers}
    config = configured(options.groups * options.workers, options.chunk, **more)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    with processes(options.workers, options.groups, options.chunk) as apart:
        backend = RayBackend(config, CONFIG.parent)
        try:
            sides = dict(zip(SIDES, (collecting(backend, config), apart), strict=True))
            for turn in range(options.turns + 1):
                for side in SIDES if turn % 2 else reversed(SIDES):
                    taken = timed(sides[side], turn)
                    if turn:  # the first warms up
                        seconds[side].append(taken)
        finally:
            backend.close()
    made = images_of(config)
    found = {"machine": machine(1), "workers": options.workers, "images": made, "chunk": options.chunk}
    turns = [dict(zip(seconds, own, strict=True)) for own in zip(*seconds.values(), strict=True)]
    rates = summary([{side: made / taken for side, taken in own.items()} for own in turns])
    ratio = summary([{"ratio": own["processes"] / own["workers"]} for own in turns])
    found |= {"turns": options.turns, "images_per_s": rates, **ratio}
    print(json.dumps(found))
    if options.out:
        write(options.out, found)


if __name__ == "__main__":
    main()
