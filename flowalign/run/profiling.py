"""Where the time of an alignment goes: each process of a run watches two iterations and traces one, `Profiler`.

The first iteration is left out: it allocates, and may compile.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from flowalign.config.run import RunConfig
from flowalign.record.disk import folder_for, write_text
from flowalign.record.spans import OUTSIDE, Watch, watching

FOLDER = "profile"
WATCHED = 2  # iterations, after the first
MODEL = ("network", "backward", "decode", "texts")  # passes of the models; all else is not the model


class Profiler:
    """Tells what one process of a run does in its second and third iteration, and traces all of its fourth.

    ``at`` is called with the number of an iteration whenever the process begins on it; `close` at the end of the run.
    The run's folder then holds ``profile/NAME.json``, seconds an iteration by phase and part, and
    ``profile/NAME.trace.json``, which chrome://tracing and Perfetto read.
    """

    def __init__(self, config: RunConfig, name: str) -> None:
        self._folder, self._name = Path(config.runs_dir) / config.name / FOLDER, name
        self._first: int | None = None
        self._seen = 0
        self._under_way = ExitStack()
        self._watch: Watch | None = None
        self._trace: Any = None

    def at(self, iteration: int) -> None:
        self._first = iteration if self._first is None else self._first
        while self._seen < iteration - self._first:
            self._seen += 1
            if self._seen == 1:
                self._watch = self._under_way.enter_context(watching())
            elif self._seen == 1 + WATCHED:
                self._end_watch(WATCHED)
                os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it tells a CPU that it is no GPU
                kinds = [torch.profiler.ProfilerActivity.CPU]
                kinds += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
                self._trace = self._under_way.enter_context(torch.profiler.profile(activities=kinds))
                self._under_way.enter_context(watching())  # so that spans are in the trace
            elif self._seen == 2 + WATCHED:
                self.close()

    def close(self) -> None:
        """Write what was seen."""
        self._end_watch(max(1, min(self._seen, WATCHED)))
        self._under_way.close()
        if self._trace is not None:
            with folder_for(self._folder):
                self._trace.export_chrome_trace(str(self._folder / f"{self._name}.trace.json"))
            self._trace = None

    def _end_watch(self, iterations: int) -> None:
        if self._watch is None:
            return
        self._under_way.close()
        found: dict[str, dict[str, float]] = {}
        for (phase, part), seconds in sorted(self._watch.seconds.items()):
            found.setdefault(phase, {})[part] = seconds / iterations
        self._watch = None
        with folder_for(self._folder):
            write_text(self._folder / f"{self._name}.json", json.dumps(found, indent=1) + "\n")


_profilers: dict[str, Profiler] = {}


def profiler_of(config: RunConfig, name: str) -> Profiler | None:
    """Return the profiler of this process, made by whoever asks first; None where the run is not profiled.

    The workers of one process share it, since torch traces a process as a whole.
    """
    if not config.logging.profile:
        return None
    place = f"{config.runs_dir}/{config.name}"
    if place not in _profilers:
        _profilers[place] = Profiler(config, name)
    return _profilers[place]


def read_profile(run_dir: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return seconds an iteration by process, phase and part; empty where the run was not profiled."""
    files = sorted((run_dir / FOLDER).glob("*.json"))
    own = (file for file in files if not file.name.endswith(".trace.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in own}


def profile_rows(process: dict[str, dict[str, float]]) -> list[tuple[str, str, float, float]]:
    """Return phase, part, seconds an iteration and share of the process's time, the longest phase first."""
    total = sum(map(sum, (parts.values() for parts in process.values()))) or 1.0
    phases = sorted(process, key=lambda phase: (phase == OUTSIDE, -sum(process[phase].values())))
    return [
        (phase, part, seconds, seconds / total)
        for phase in phases
        for part, seconds in sorted(process[phase].items(), key=lambda item: -item[1])
    ]


def not_the_model(process: dict[str, dict[str, float]]) -> tuple[float, float]:
    """Return seconds an iteration that are no pass of a model, and their share."""
    total = sum(map(sum, (parts.values() for parts in process.values())))
    model = sum(seconds for parts in process.values() for part, seconds in parts.items() if part in MODEL)
    return total - model, (total - model) / total if total else 0.0
