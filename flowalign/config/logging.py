"""The copies of a run's metrics, and what else it writes about itself."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from flowalign.config.section import Section

Wandb = Literal["offline", "online", "disabled"]


class LoggingConfig(Section):
    """The second copy of the metrics, for wandb."""

    wandb: Wandb = "offline"
    """``offline``: written beside the run, for ``wandb sync``. ``online``: sent while the run goes."""
    wandb_project: str = "flowalign"
    """Project that the runs belong to."""
    profile: bool = False
    """A profile of an alignment's second to fourth iteration in the run's folder, see docs/running.md."""

    @field_validator("wandb", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "disabled" if value is None or str(value).lower() in ("false", "off", "no", "none") else value
