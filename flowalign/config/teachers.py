"""The section of a teacher that an alignment run distils from."""

from __future__ import annotations

from typing import Annotated

from flowalign.config.fields import Resolved
from flowalign.config.guidance import GuidanceKeys
from flowalign.config.section import Section
from flowalign.config.sections import Weights


class TeacherConfig(GuidanceKeys, Section):
    """A frozen network that an alignment run distils from."""

    path: Annotated[str, Resolved("teacher")]
    """A pipeline directory, a run of this model or one of its checkpoints."""
    weights: Weights = "model"
    """Weights of a run that teach; ``ema``: their average."""
    norm_preserving: bool = False
    """Guided velocity rescaled to the norm of the conditional one."""
    tasks: list[str] | None = None
    """Tasks whose samples it teaches; null: all that no other teacher has."""
