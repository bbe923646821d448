"""The directory of a run that is to begin or to go on: checked, and begun once all that the run needs stands."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from flowalign.config.run import RunConfig
from flowalign.config.section import ConfigError
from flowalign.intake.changes import changed_rates, refuse_changes
from flowalign.intake.resolved import read_resolved, write_resolved
from flowalign.record.checkpoint import has_any
from flowalign.record.kinds import check_kinds
from flowalign.record.mirror import check_trackers
from flowalign.record.outputs import unwritable
from flowalign.record.textfiles import is_there
from flowalign.run.made import Accepted


def check_run(config: RunConfig, accepted: Collection[str] = ()) -> Path:
    """Return the run's directory, untouched.

    It can be written, and if it is continued, it fits what it was begun with, but for what lies at the paths of the
    ``accepted`` keys.

    Raises:
        RunDirectoryError: it holds what a run cannot write to. ConfigError: it cannot be written, or does not fit.
    """
    run_dir = Path(config.runs_dir) / config.name
    if os.path.lexists(run_dir):
        check_kinds(run_dir)
    if reason := unwritable(run_dir):
        raise ConfigError("runs_dir", f"{run_dir} cannot be written ({reason}); {_other(run_dir)}")
    if config.checkpoint.resume != "never" and has_any(run_dir / "checkpoints") and (run_dir / "config.yaml").is_file():
        refuse_changes(read_resolved(run_dir), config, run_dir, accepted)
    check_trackers(config.logging)
    return run_dir


def _other(run_dir: Path) -> str:
    """Return a sentence on what to do about a directory that cannot be written."""
    return "make it writable, which continues the run, or choose another" if is_there(run_dir) else "choose another"


def begin_run(config: RunConfig, accepted: Accepted | None = None) -> Path:
    """Record the configuration in the run directory, once all that the run needs stands: a refused one leaves none.

    So are the changes that were accepted. Raises DiskError.
    """
    run_dir = check_run(config, () if accepted is None else accepted.keys)
    write_resolved(config, run_dir, () if accepted is None else accepted.changes)
    return run_dir


def accepted_of(config: RunConfig, keys: Collection[str]) -> Accepted:
    """Return the differences that ``keys`` allow from the run that ``config`` continues."""
    run_dir = Path(config.runs_dir) / config.name
    if not keys or not has_any(run_dir / "checkpoints") or not (run_dir / "config.yaml").is_file():
        return Accepted(tuple(keys))
    return Accepted(tuple(keys), changed_rates(read_resolved(run_dir), config, keys))
