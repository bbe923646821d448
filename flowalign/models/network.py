"""The half of a model that learns."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from flowalign.flow.schedule import PipelineSchedule
from flowalign.types import Condition


class Network(Protocol):
    """A ``module`` that learns, and what it computes: the velocity of the straight path, whatever its path is.

    ``path_family`` says which path it was trained on (see ``flow.pathfamilies``). It knows neither texts nor pictures.
    """

    module: nn.Module
    path_family: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """The numbers that it takes beside the time."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def patch_size(self) -> int:
        """The side of a token in latents."""
        ...

    @property
    def lora_targets(self) -> list[str]:
        """Module names that a LoRA adapts unless the configuration says otherwise."""
        ...

    def with_module(self, module: nn.Module) -> Network:
        """Return the same network with another module, such as a frozen copy of its own."""
        ...

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        r: Tensor | None = None,
        guidance: float | Tensor | None = None,
    ) -> Tensor:
        """Compute dx/dt, float32, at x (N, C, H, W), t (N,), in one call of the module.

        ``r`` and ``guidance`` are numbers for a network that takes them; `guided` makes two calls of a scale.
        """
        ...

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Return (C, h, w) of an image size in pixels, None being the model's own. Raise ModelError where none fits."""
        ...

    def schedule(self, height: int | None = None, width: int | None = None) -> PipelineSchedule:
        """Return the noise levels that the model's own pipeline walks at an image size in pixels, None being its
        own."""
        ...
