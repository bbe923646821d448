"""The sections by which a model is opened, sampled and judged, whoever made it."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field

from flowalign.config.alignment import AlignConfig
from flowalign.config.run import EvaluationConfig, RolloutConfig
from flowalign.config.section import Section
from flowalign.config.sections import ModelConfig, Positive, RewardConfig


class SampledConfig(Section):
    """The sections of a model that no alignment run made: a pipeline directory, or what was trained on latents."""

    name: str = "pipeline"
    """Name in its card."""
    model: ModelConfig
    """The model."""
    rollout: RolloutConfig = RolloutConfig()
    """Geometry of its samples."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """The way in which it is sampled and judged."""
    rewards: list[RewardConfig] = Field(default_factory=list)
    """What it was trained on: nothing."""
    threads: Positive = 2
    """Torch threads."""
    device: str = "cpu"
    """``cpu``, ``cuda`` or ``cuda:N``."""

    @property
    def rollout_embeddings(self) -> Path | None:
        """The folder that embeddings of prompts are read from; None: there is none."""
        return None if self.rollout.embeddings is None else Path(self.rollout.embeddings)

    @property
    def reward_device(self) -> str:
        return "cpu"

    def on(self, device: str) -> Self:
        """Return the same on another device."""
        return self.model_copy(update={"device": device})


Sampled = AlignConfig | SampledConfig
