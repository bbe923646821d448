"""What studies of alignments share: cells, what an iteration takes, runs of so many minutes, cells side by side.

A run is a function of its configuration and seed, whatever else the machine does; only its speed is not. So seconds are
measured apart from learning, on an idle machine, and a run of so many minutes is one of as many iterations as would fit
into them there, evaluations left out.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import psutil
from cells import (
    GOLD,
    HELD_OUT,
    OFFICIAL,
    ROOT,
    STRICT,
    TASKS,
    Failed,
    align,
    base_digest,
    local,
    machine,
    read,
    slug,
    write,
)

from flowalign.algorithms import algorithm_class
from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.intake.file import load_align
from flowalign.record.metrics import read_metrics

TIMED_ITERATIONS = 5
PLACE = ("name", "runs_dir", "model.path", "seed", "cluster", "logging")
# What `Budget.overrides` sets, whatever a configuration says.
SET_BY_BUDGET = ("iterations", "learner.optimizer.decay_steps", "evaluation.every", "evaluation.gold", "checkpoint")


@dataclass(frozen=True)
class Cell:
    """A configuration under configs/shapes, and what differs from it."""

    config: str
    title: str
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return ROOT / "configs" / "shapes" / f"{self.config}.yaml"

    def load(self) -> AlignConfig:
        """Read and check the configuration of a run of this cell. Raise ConfigError."""
        return load_align(self.file, local(self.overrides, 1, Path("runs"), "cell")).config


@dataclass(frozen=True)
class Budget:
    """Minutes of training, evaluations in them beside the first, and samples of each; None: the configuration's."""

    minutes: float
    evaluations: int = 4
    num_samples: int | None = None

    def overrides(self, config: AlignConfig, iteration_s: float) -> dict[str, Any]:
        """Return what makes a run of ``config`` one of these minutes; the learning rate falls over all of it."""
        every = max(1, round(self.minutes * 60 / iteration_s / self.evaluations))
        iterations, learner = every * self.evaluations, config.learner
        samples = {} if self.num_samples is None else {"evaluation.num_samples": self.num_samples}
        return {
            "iterations": iterations,
            "learner.optimizer.decay_steps": iterations * learner.updates_per_iteration * learner.epochs,
            "evaluation.every": every,
            "evaluation.gold": [HELD_OUT],
            "checkpoint.every": every,
            "checkpoint.keep_last": 1,
            **samples,
        }


def faults(cells: Mapping[str, Cell]) -> Iterator[str]:
    """Yield what is wrong with the configurations of a study, and cells that are the same run."""
    known: dict[str, str] = {}
    for name, cell in cells.items():
        try:
            config = cell.load()
        except ConfigError as error:
            yield f"{name}: {error}"
            continue
        first = known.setdefault(config.model_dump_json(), name)
        if first != name:
            yield f"{name}: is the same run as {first}"


def measure(name: str, cell: Cell, options: argparse.Namespace) -> dict[str, float]:
    """Seconds, images and transitions of an iteration: medians without the first, which warms up."""
    more = {"iterations": TIMED_ITERATIONS, "evaluation.every": 0, "checkpoint.resume": "never"}
    more |= {"checkpoint.best_metric": "reward/total/mean", "checkpoint.keep_best": 0}
    run = align(cell.config, {**cell.overrides, **more}, options.threads, options.work_dir / "time", slug(name))
    rows = read_metrics(run / "metrics.jsonl")[1:]
    keys = {"iteration_s": "time/iteration_s", "rollout_s": "time/rollout_s", "learn_s": "time/learn_s"}
    measured = {key: statistics.median(row[source] for row in rows) for key, source in keys.items()}
    measured["transitions"] = statistics.median(row["learner/transitions"] for row in rows)
    measured["images"] = float(round(rows[0]["throughput/images_per_s"] * rows[0]["time/iteration_s"]))
    return measured


def time_cells(path: Path, cells: Mapping[str, Cell], options: argparse.Namespace) -> None:
    """Measure cells one after the other, and keep what was found in ``path`` beside what is known of this machine."""
    here = machine(options.threads)
    there = read(path, "machine") if path.exists() else {"machine": here, "cells": {}}
    if there["machine"] != here:
        raise SystemExit(f"{path} is of another machine or of other threads ({there['machine']}); remove it first")
    write(path, there)
    for name, cell in cells.items():
        there["cells"][name] = measure(name, cell, options)
        print(json.dumps({"cell": name, **there["cells"][name]}), flush=True)
        write(path, there)


def run_cell(
    name: str, cell: Cell, seed: int, iteration_s: float, budget: Budget, options: argparse.Namespace
) -> dict[str, Any]:
    """One alignment from start to end, or on from where it was killed."""
    config = cell.load()
    more = {**cell.overrides, "seed": seed, **budget.overrides(config, iteration_s)}
    run = align(cell.config, more, options.threads, options.work_dir, f"{name}-seed{seed}")
    rows = read_metrics(run / "metrics.jsonl")
    return {
        **asked(name, cell, seed, budget),
        "learning_rate": config.learner.optimizer.learning_rate,
        "iteration_s": iteration_s,
        "machine": machine(options.threads),
        "wall_s": rows[-1]["wall_s"],
        "points": points(rows),
        **groups(rows, config),
    }


def identity(name: str, cell: Cell, seed: int) -> dict[str, Any]:
    """Which cell a run is of, on which base, with which seed."""
    return {
        "cell": name,
        "config": f"configs/shapes/{cell.config}.yaml",
        "overrides": dict(cell.overrides),
        "base": base_digest(),
        "seed": seed,
    }


def settings(config: AlignConfig, left_out: Sequence[str] = ()) -> dict[str, Any]:
    """Return what a configuration says of learning, by dotted keys, as JSON has it.

    The name of a file says less: configs/shapes is tuned time and again. What has its default counts as not written, so
    that a new key changes nothing. The place, the seed and the keys ``left_out`` are none of it.
    """
    found: dict[str, Any] = {}

    def add(key: str, value: Any) -> None:
        parts = value.items() if isinstance(value, dict) else enumerate(value) if _sections(value) else ()
        for name, part in parts:
            add(f"{key}.{name}" if key else str(name), part)
        if not parts:
            found[key] = value

    kind = algorithm_class(config.algorithm["type"])
    algorithm = kind.Config.model_validate(config.algorithm).model_dump(mode="json", exclude_defaults=True)
    written = config.model_dump(mode="json", exclude_defaults=True)
    add("", {**written, "algorithm": {**algorithm, "type": config.algorithm["type"]}})
    return without(found, (*PLACE, *left_out))


def _sections(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(part, dict) for part in value)


def without(found: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Return settings without those at ``keys`` and below them."""
    return {
        key: value for key, value in found.items() if not any(key == own or key.startswith(f"{own}.") for own in keys)
    }


def asked(name: str, cell: Cell, seed: int, budget: Budget) -> dict[str, Any]:
    """What a run is, apart from where it ran and what it found."""
    return {**identity(name, cell, seed), **vars(budget), "settings": settings(cell.load(), SET_BY_BUDGET)}


def images_in(row: Mapping[str, Any]) -> int:
    """Images that an iteration made and a reward judged, by its row of the metrics."""
    return round(row.get("throughput/images_per_s", 0) * row.get("time/iteration_s", 0))


def points(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each evaluation found, and what had been used by then."""
    found, images, transitions = [], 0, 0
    for row in rows:
        images += images_in(row)
        transitions += int(row.get("learner/transitions", 0))
        if STRICT not in row:
            continue
        scores = {key: row[key] for key in (STRICT, OFFICIAL, GOLD)}
        scores |= {f"eval/geneval_strict/{task}": row[f"eval/geneval_strict/{task}"] for task in TASKS}
        found.append({"iteration": row["iteration"], "images": images, "transitions": transitions, **scores})
    return found


def groups(rows: Sequence[Mapping[str, Any]], config: AlignConfig) -> dict[str, float]:
    """Means over iterations: the share of groups of a first draw whose images all score alike, and how many groups of
    all draws have images that do not."""
    size = config.algorithm["group_size"]
    silent = [row.get("refill/silent", row["zero_std_fraction"]) for row in rows if "zero_std_fraction" in row]
    taught = [images_in(row) / size * (1 - row["zero_std_fraction"]) for row in rows if "zero_std_fraction" in row]
    return {"silent": statistics.fmean(silent), "taught": statistics.fmean(taught)} if silent else {}


def side_by_side(work: Mapping[Path, Any], jobs: int) -> list[str]:
    """Run cells, each a process of its own, so many at a time; return those that failed, whose logs say why."""
    failed: list[str] = []
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(run): target.stem for target, run in work.items()}
        try:
            for done in as_completed(running):
                if isinstance(error := done.exception(), Failed):
                    print(json.dumps({"cell": running[done], "exit_code": error.returncode, "said": str(error)}))
                    sys.stdout.flush()
                    failed.append(running[done])
                else:
                    done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def end_cells(*_: Any) -> NoReturn:
    """Hand SIGTERM on, so that the cells write a checkpoint to go on from."""
    for child in psutil.Process().children():
        child.terminate()
    raise KeyboardInterrupt


@contextmanager
def ended_early() -> Iterator[None]:
    """Inside, SIGTERM or Ctrl-C end the cells and then this command, with the exit code of what goes on later."""
    signal.signal(signal.SIGTERM, end_cells)
    try:
        yield
    except KeyboardInterrupt:
        print("ended early: the same command continues", file=sys.stderr)
        raise SystemExit(75) from None
