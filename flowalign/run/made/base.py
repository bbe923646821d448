"""The base model of a checkpoint, held against the files that its run was made of when it is opened again."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowalign.run.made.ingredients import pipeline_parts
from flowalign.run.made.records import ALL, hash_now, pipeline_difference, said_of

KEY = "model.path"
_TRAINED = ("transformer/*.safetensors", "transformer/*.safetensors.index.json", "transformer/*.bin")


def changed_base(state: Mapping[str, Any], model: Path, *, weights_too: bool) -> str | None:
    """Say which file of the pipeline at ``model`` is not what a checkpoint's ``state`` was trained with.

    None where all are, or where the checkpoint does not say (version 0.1). The transformer's weights count with
    ``weights_too``: a checkpoint of all weights brings its own.
    """
    recorded = state.get("made_of", {}).get(KEY)
    if recorded is None:
        return None

    def counts(name: str) -> bool:
        return weights_too or not any(fnmatch.fnmatchcase(name, pattern) for pattern in _TRAINED)

    # Of more files than are listed there is one hash for all, the transformer's weights among them.
    parts = [part for part in pipeline_parts(KEY, model) if ALL in recorded or counts(part.name)]
    was = {name: known for name, known in recorded.items() if counts(name)}
    changes = pipeline_difference(KEY, was, parts, hash_now)
    return said_of(parts, changes) if changes else None
