"""Checks of runs that teach: they are shown the model's own states and prompts, which must mean the same to them."""

from __future__ import annotations

import json
from pathlib import Path

from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.intake.resolved import read_resolved
from flowalign.models.directory import is_pipeline
from flowalign.models.fingerprint import encoders_of, same_encoders
from flowalign.record.checkpoint import CheckpointError, find, verify
from flowalign.run.made.base import changed_encoders
from flowalign.run.teachers import teachers_of


def check_runs_that_teach(config: AlignConfig) -> None:
    """Check that every teacher that is a run was trained with the text encoders and the autoencoder of the model.

    Their files are read, which takes its time. Of a pipeline that teaches `load_teachers` checks it.

    Raises:
        ConfigError: one learned with others.
    """
    for name, teacher in teachers_of(config).items():
        if not is_pipeline(Path(teacher.path)):
            _check_encoders(f"algorithm.teachers.{name}.path", Path(teacher.path), config.model)


def _check_encoders(key: str, run: Path, model: ModelConfig) -> None:
    try:
        found = find(run, None)
        verify(found, ("state.json",))
    except CheckpointError:
        return  # whoever loads it says so
    state = json.loads((found / "state.json").read_bytes())
    changed = changed_encoders(state, Path(model.path))
    if changed is None:
        return
    folder = next((place for place in (found, *found.resolve().parents[:2]) if (place / "config.yaml").is_file()), None)
    base = read_resolved(folder).model if folder is not None else model
    if folder is None or not Path(base.path).is_dir():
        # Saving a pipeline anew changes no weights of its encoders; nobody can tell more where the run's base is gone.
        changed = changed_encoders(state, Path(model.path), weights_alone=True)
    elif changed_encoders(state, Path(base.path)) is None:
        changed = None if same_encoders(encoders_of(base), encoders_of(model)) else changed
    if changed is not None:
        raise ConfigError(
            key,
            f"{run} learned with other text encoders or another autoencoder than lie at {model.path} now ({changed}); "
            "a teacher needs the model's own",
        )
