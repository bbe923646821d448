"""The copies of a run's metrics, and what else it writes about itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from flowalign.config.section import Section

Wandb = Literal["offline", "online", "disabled"]
Tracker = Literal["tensorboard", "mlflow", "swanlab"]


class LoggingConfig(Section):
    """The copies of the metrics for trackers, with pictures, see docs/running.md."""

    wandb: Wandb = "offline"
    """``offline``: written beside the run, for ``wandb sync``. ``online``: sent while the run goes."""
    wandb_project: str = "flowalign"
    """Project that the runs belong to; MLflow's experiment, SwanLab's project."""
    trackers: list[Tracker] = Field(default_factory=list)
    """Trackers beside wandb: ``tensorboard``, ``mlflow``, ``swanlab``."""
    pictures: Annotated[int, Field(ge=0)] = 8
    """Pictures of each evaluation that a tracker gets; 0: none."""
    profile: bool = False
    """A profile of an alignment's second to fourth iteration in the run's folder, see docs/running.md."""

    @field_validator("wandb", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "disabled" if value is None or str(value).lower() in ("false", "off", "no", "none") else value

    @field_validator("trackers", mode="before")
    @classmethod
    def _wandb_apart(cls, value: Any) -> Any:
        if isinstance(value, str | list) and "wandb" in value:
            raise ValueError("wandb has a key of its own beside this list: wandb=offline, or online")
        return value
