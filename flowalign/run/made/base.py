"""The base model of a checkpoint, held against the files that its run was made of when it is opened again."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flowalign.run.made.ingredients import pipeline_parts
from flowalign.run.made.records import ALL, hash_now, pipeline_difference, said_of

KEY = "model.path"
_TRAINED = ("transformer/*.safetensors", "transformer/*.safetensors.index.json", "transformer/*.bin")
_NO_ENCODERS = ("transformer", "scheduler")
_INDEX = "model_index.json"


def changed_base(state: Mapping[str, Any], model: Path, *, weights_too: bool) -> str | None:
    """Say which file of the pipeline at ``model`` is not what a checkpoint's ``state`` was trained with.

    None where all are, or where the checkpoint does not say (version 0.1). The transformer's weights count with
    ``weights_too``: a checkpoint of all weights brings its own.
    """

    def counts(name: str) -> bool:
        return weights_too or not any(fnmatch.fnmatchcase(name, pattern) for pattern in _TRAINED)

    return _changed(state, model, counts)


def changed_encoders(state: Mapping[str, Any], model: Path, *, weights_alone: bool = False) -> str | None:
    """Say as `changed_base` which file of all that encode texts and images is another one, or of their weights."""

    def counts(name: str) -> bool:
        part, below, _ = name.partition("/")
        return bool(below) and part not in _NO_ENCODERS and (name.endswith(".safetensors") or not weights_alone)

    return _changed(state, model, counts)


def _changed(state: Mapping[str, Any], model: Path, counts: Callable[[str], bool]) -> str | None:
    recorded = state.get("made_of", {}).get(KEY)
    if recorded is None:
        return None

    def compared(name: str) -> bool:
        # Of more files than are listed there is one hash for all, the transformer's weights among them.
        return ALL in recorded or name == _INDEX or counts(name)

    parts = [part for part in pipeline_parts(KEY, model) if compared(part.name)]
    was = {name: known for name, known in recorded.items() if compared(name)}
    changes = pipeline_difference(KEY, was, parts, hash_now)
    changes = {name: hashes for name, hashes in changes.items() if name == ALL or counts(name)}
    return said_of(parts, changes) if changes else None
