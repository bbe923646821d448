"""Windows: the steps of a walk that are learned from; the kinds are those of `flowalign.flow.window.Window`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor

from flowalign.config.section import Section
from flowalign.flow import sde
from flowalign.flow.randomness import Stream, seeded


class _Steps(Section):
    start: Annotated[int, Field(ge=0)] = 0
    """First step."""
    size: Annotated[int, Field(ge=1)] | None = None
    """Number of steps; null: all from ``start`` on."""
    stop: Annotated[int, Field(ge=1)] | None = None
    """End of the steps that a window may lie in; null: that of the walk."""

    def steps(
        self, kind: sde.Kind, sigmas: Tensor, noise_level: float, *, seed: int, iteration: int
    ) -> tuple[int, int]:
        """Give the half-open range of the window, one for the whole iteration: a function of (seed, iteration).

        ``sigmas`` (K + 1,). Raises ValueError where no step of ``kind`` inside has noise, or as `sde.window_mask` does.
        """
        window = sde.Window(**self.model_dump())
        mask = sde.window_mask(window, kind, sigmas, noise_level, seeded(seed, Stream.WINDOW, iteration), iteration)
        steps = mask.nonzero().flatten().tolist()
        if not steps:
            raise ValueError(f"window: of {len(mask)} steps of kind {kind!r} none inside is stochastic")
        return steps[0], steps[-1] + 1


class StillWindow(_Steps):
    """Steps that lie still or are drawn anew for each iteration."""

    kind: Literal["full", "fixed", "random"] = "full"
    """``full``: all steps that have noise. ``fixed``: ``size`` steps from ``start``. ``random``: ``size`` in a row,
    drawn for each iteration.
    """


class MovingWindow(_Steps):
    """Steps that may also slide along the schedule; an option that its kind would ignore is refused."""

    kind: Literal["full", "fixed", "random", "sliding"] = "full"
    """``full``: all steps that have noise. ``fixed``: ``size`` steps from ``start``. ``random``: ``size`` in a row,
    drawn for each iteration. ``sliding``: ``size`` from a place that moves along the schedule (MixGRPO,
    arXiv:2507.21802).
    """
    every: Annotated[int, Field(ge=1)] = 25
    """Iterations at one place."""
    stride: Annotated[int, Field(ge=1)] = 1
    """Steps from one place to the next."""
    decay: Annotated[float, Field(ge=0)] = 0.0
    """Decay of ``every`` along the schedule."""
    decay_start: Annotated[int, Field(ge=0)] = 0
    """Step from which it decays."""
    wrap: bool = True
    """From the end back to ``start``."""

    @model_validator(mode="after")
    def _nothing_ignored(self) -> MovingWindow:
        if self.kind == "full" and self.size is not None:
            raise ValueError("a full window has no size; write kind: fixed, random or sliding")
        if self.kind == "fixed" and self.stop is not None:
            raise ValueError("a fixed window ends at start + size; leave stop out")
        if self.kind != "sliding":
            still = MovingWindow.model_fields
            for name in ("every", "stride", "decay", "decay_start", "wrap"):
                if getattr(self, name) != still[name].default:
                    raise ValueError(f"{name}: a {self.kind} window does not slide; write kind: sliding")
        return self
