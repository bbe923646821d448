"""Trackers: what opens a run's record in wandb, TensorBoard, MLflow or SwanLab, a function each.

Each gets every row of metrics.jsonl under the names that it has there, and pictures of each evaluation. All write files
of their own unless the user sends them elsewhere.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from flowalign.config.logging import Wandb

PICTURES = "samples"
_START_S, _FINISH_S = 30, 60  # most that wandb waits for its server
_PARAMS, _LONGEST = 100, 500  # of MLflow: parameters a call, characters of one


@dataclass(frozen=True)
class Record:
    """The run that a tracker is opened for.

    ``id`` is one record's for ever: a run that is continued has the same, one that goes back or begins anew has
    another. ``begun`` is the iteration that the run goes on after, -1 where it begins, ``recorded`` the last step that
    this tracker got of this record; None: it got nothing of it. ``mode`` is wandb's.
    """

    run_dir: Path
    name: str
    id: str
    project: str
    mode: Wandb
    config: Mapping[str, Any]
    begun: int = -1
    recorded: int | None = None


@dataclass(frozen=True)
class Picture:
    """A picture of an evaluation: its file, its name there, the prompt."""

    file: Path
    name: str
    prompt: str


@dataclass(frozen=True)
class Tracker:
    """An opened record, which holds all steps up to ``after``; None: it holds none yet."""

    after: int | None
    row: Callable[[Mapping[str, float], int], None]
    pictures: Callable[[Sequence[Picture], int], None]
    close: Callable[[], Any]


def wandb(record: Record) -> Tracker:
    """Open wandb's record in ``wandb/`` of the run directory, which ``wandb sync`` sends, or online."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    run = wandb.init(
        project=record.project,
        name=record.name,
        id=record.id,
        config=dict(record.config),
        dir=str(record.run_dir),
        mode=record.mode,
        resume="allow",
        settings=wandb.Settings(console="off", x_disable_stats=True, init_timeout=_START_S, finish_timeout=_FINISH_S),
    )

    def pictures(shown: Sequence[Picture], step: int) -> None:
        run.log({PICTURES: [wandb.Image(str(one.file), caption=one.prompt) for one in shown]}, step=step)

    return Tracker(record.recorded, lambda row, step: run.log(dict(row), step=step), pictures, run.finish)


def tensorboard(record: Record) -> Tracker:
    """Open event files in ``tensorboard/`` of the run directory: ``tensorboard --logdir runs``.

    What a run does again after a checkpoint takes the place of what its readers found there before.
    """
    from torch.utils.tensorboard import SummaryWriter

    from rewards.pictures import read

    folder = record.run_dir / "tensorboard"
    after = None if record.recorded is None else record.begun
    writer = SummaryWriter(str(folder), purge_step=0 if after is None else after + 1)
    if after is None:
        writer.add_text("config", _markdown(record.config))

    def row(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # a run that is killed keeps what it said

    def pictures(shown: Sequence[Picture], step: int) -> None:
        for one in shown:
            picture = read(one.file.read_bytes())
            writer.add_image(f"{PICTURES}/{one.name}", picture, step, dataformats="HWC")

    return Tracker(after, row, pictures, writer.close)


def mlflow(record: Record) -> Tracker:
    """Open MLflow's record on the server that ``MLFLOW_TRACKING_URI`` names, else in ``mlflow.db`` beside the run
    directories."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from rewards.pictures import read

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    entities = import_module("mlflow.entities")
    runs = record.run_dir.parent.absolute()
    own = None if os.environ.get("MLFLOW_TRACKING_URI") else f"sqlite:///{runs / 'mlflow.db'}"
    client = import_module("mlflow").MlflowClient(own)
    experiment = client.get_experiment_by_name(record.project)
    home = (runs / "mlartifacts").as_uri() if own else None
    where = experiment.experiment_id if experiment else client.create_experiment(record.project, home)
    found = client.search_runs([where], f"tags.record = '{record.id}'")
    run = (
        found[0] if found else client.create_run(where, tags={"record": record.id}, run_name=record.name)
    ).info.run_id
    after = max((metric.step for metric in client.get_metric_history(run, "wall_s")), default=None)
    if found:
        client.update_run(run, status="RUNNING")
    params = [] if found else [entities.Param(key, str(value)[:_LONGEST]) for key, value in _flat(record.config)]
    for first in range(0, len(params), _PARAMS):
        client.log_batch(run, params=params[first : first + _PARAMS])

    def row(values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        made = [entities.Metric(re.sub(r"[^\w\-. /:]", "_", name), value, now, step) for name, value in values.items()]
        client.log_batch(run, metrics=made)

    def pictures(shown: Sequence[Picture], step: int) -> None:
        for one in shown:
            client.log_image(run, read(one.file.read_bytes()), key=f"{PICTURES}/{one.name}", step=step)

    return Tracker(after, row, pictures, lambda: client.set_terminated(run))


def swanlab(record: Record) -> Tracker:
    """Open SwanLab's record in ``swanlog/`` of the run directory, which ``swanlab sync`` sends."""
    swanlab = import_module("swanlab")
    folder, settings = record.run_dir / "swanlog", swanlab.Settings
    folder.mkdir(parents=True, exist_ok=True)
    probe = dict.fromkeys(("hardware", "runtime", "requirements", "git", "monitor"), False)
    run = swanlab.init(
        project=record.project,
        name=record.name,
        id=record.id,
        config=dict(record.config),
        log_dir=str(folder),
        mode="offline",
        resume="allow",
        settings=settings(
            interactive=False, terminal=settings.Terminal(proxy_type="none"), probe=settings.Probe(**probe)
        ),
    )

    def pictures(shown: Sequence[Picture], step: int) -> None:
        run.log({PICTURES: [swanlab.Image(str(one.file), caption=one.prompt) for one in shown]}, step=step)

    return Tracker(record.recorded, lambda row, step: run.log(dict(row), step=step), pictures, run.finish)


TRACKERS: dict[str, Callable[[Record], Tracker]] = {
    "wandb": wandb,
    "tensorboard": tensorboard,
    "mlflow": mlflow,
    "swanlab": swanlab,
}


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of a configuration with their dotted keys."""
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        nested = isinstance(value, Mapping) and value
        found += _flat(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return found


def _markdown(config: Mapping[str, Any]) -> str:
    return "\n".join(f"    {key}: {value}" for key, value in _flat(config))
