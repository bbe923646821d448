"""The contract of a policy: a pretrained flow-matching image model that can be rolled out and trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from flowalign.flow.schedule import PipelineSchedule
from flowalign.types import Condition, TextPart


class ModelError(ValueError):
    """A model directory that is missing, incomplete or of the wrong kind."""


class Policy(Protocol):
    """A transformer with its text encoders, autoencoder and schedule.

    ``network`` is the module that learns; everything else is frozen. ``family`` says what its output means (see
    ``flow.families``), ``inputs`` which numbers it takes beside the time; ``velocity`` is that of the straight path
    whatever they are.
    """

    network: nn.Module
    family: str

    @property
    def inputs(self) -> tuple[str, ...]: ...

    def use_network(self, network: nn.Module) -> None:
        """Put another network of the same family in the place of ``network``."""
        ...

    @classmethod
    def load(cls, directory: Path, *, max_sequence_length: int, device: str, dtype: torch.dtype) -> Policy:
        """Raises ModelError when the directory holds no such model."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """One row for each distinct prompt, mapped back to all of them, plus the empty prompt's embeddings."""
        ...

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        r: Tensor | None = None,
        guidance: float | Tensor | None = None,
        norm_preserving: bool = False,
    ) -> Tensor:
        """dx/dt at x (N, C, H, W), t (N,); with ``guidance`` above 1, one batched guided call."""
        ...

    @property
    def text_parts(self) -> dict[str, TextPart]:
        """Where in a condition each text encoder's output lies, by the encoder's name."""
        ...

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) about [0, 1], float32, of latents (N, C, h, w); differentiable."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images, uint8 (N, H, W, 3), of latents (N, C, h, w)."""
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (N, C, h, w) of images, uint8 (N, H, W, 3): the posterior's mean."""
        ...

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(C, h, w) of an image size in pixels; None: the model's own size."""
        ...

    def schedule(self, height: int | None, width: int | None) -> PipelineSchedule:
        """The noise levels that the model's own pipeline walks at an image size in pixels; None: the model's own."""
        ...

    def keep_network(self) -> None:
        """Free all but ``network``, for a model that is only asked for velocities; nothing else works afterwards."""
        ...

    @property
    def lora_targets(self) -> list[str]:
        """Module names that a LoRA adapts unless the configuration says otherwise."""
        ...
