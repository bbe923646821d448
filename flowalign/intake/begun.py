"""What a run that goes on was begun with, where that decides what is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowalign.config.run import RunConfig
from flowalign.intake.paths import Config
from flowalign.record.checkpoint import has_any
from flowalign.record.yamlfiles import read_mapping


def begun_with(config: RunConfig) -> Mapping[str, Any] | None:
    """Return the recorded configuration of the run that ``config`` goes on with; None: it begins anew."""
    recorded = (run_dir := Path(config.runs_dir) / config.name) / "config.yaml"
    if config.checkpoint.resume == "never" or not recorded.is_file() or not has_any(run_dir / "checkpoints"):
        return None
    return read_mapping(recorded)


def compiled_as_begun(config: Config) -> tuple[Config, tuple[str, ...]]:
    """Return ``config`` with ``learner.compile: auto`` as it was decided when the run began, and a sentence on that.

    A run goes on as it was begun: compiled or not it has other bits.
    """
    recorded = begun_with(config) if config.learner.compile == "auto" else None
    decided = None if recorded is None else (recorded.get("learner") or {}).get("compile")
    if not isinstance(decided, bool):
        return config, ()
    learner = config.learner.model_copy(update={"compile": decided})
    said = f"learner.compile: auto is {str(decided).lower()}, as the run was begun"
    return config.model_copy(update={"learner": learner}), (said,)
