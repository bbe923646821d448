"""Pipeline directories that name code of their own, which is never run."""

from __future__ import annotations

from pathlib import Path

from flowalign.models.errors import ModelError


def refuse_custom_code(directory: Path) -> None:
    """Raise ModelError for a directory whose files name code that lies in it or elsewhere.

    The ``pipeline.py`` of our own exports is no such code: it is for diffusers, we load the parts.
    """
    from rewards.models.customcode import custom_code

    if (found := custom_code(directory)) is not None:
        raise ModelError(
            f"model.path: {directory} names code of its own in {found}, which is never run; "
            "give a pipeline of diffusers' and transformers' own classes"
        )
