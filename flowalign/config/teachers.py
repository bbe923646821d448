"""The section of a teacher that an alignment run distils from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from flowalign.config.section import Section


class TeacherConfig(Section):
    """A frozen network at ``path``: a pipeline directory, a run of this model or one of its checkpoints.

    It teaches the samples of its ``tasks``; null: those of every task that no other teacher has.
    """

    path: str
    weights: Literal["model", "ema"] = "model"
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    norm_preserving: bool = False
    tasks: list[str] | None = None
