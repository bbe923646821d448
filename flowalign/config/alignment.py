"""The configuration of an alignment run, and the cross-checks that need no model."""

# pyright: reportIncompatibleVariableOverride=false
# Sections are frozen, so that a field may be narrowed.

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from flowalign.config.fields import MayChange
from flowalign.config.run import Passes, RunConfig, SafetyConfig
from flowalign.config.sections import DataConfig, Positive, RewardConfig
from flowalign.config.updates import LearnerConfig


class AlignConfig(RunConfig):
    """A whole alignment run."""

    iterations: Annotated[Positive, MayChange()] = Field()
    """Iterations from the beginning of the run."""
    data: DataConfig = DataConfig()
    """Prompts, or pairs."""
    rewards: list[RewardConfig] = Field(default_factory=list)
    """What the images are scored by."""
    learner: LearnerConfig = LearnerConfig()
    """Updates of the policy."""
    safety: SafetyConfig = SafetyConfig()
    """Limits of a collapse."""
    min_valid_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Least share of an iteration's images with a usable score, below which the run ends."""

    @property
    def command(self) -> str:
        return "align"

    @property
    def passes(self) -> Passes:
        learner = self.learner
        return Passes(learner.micro_batch_size, learner.updates_per_iteration, learner.epochs)

    @property
    def trained_rewards(self) -> list[RewardConfig]:
        return self.rewards

    @property
    def rollouts_compile(self) -> bool:
        return self.learner.compiles

    @property
    def limits(self) -> SafetyConfig:
        return self.safety

    @model_validator(mode="after")
    def _together(self) -> AlignConfig:
        if "type" not in self.algorithm:
            raise ValueError("algorithm.type is missing: name the algorithm, e.g. flow_grpo")
        names = [reward.label for reward in self.rewards]
        if len(set(names)) != len(names):
            raise ValueError(f"rewards: two rewards share a name ({', '.join(names)}); give each its own `name`")
        judges = [judge.label for judge in self.evaluation.judges]
        if len(set(judges)) != len(judges):
            raise ValueError(
                f"evaluation.gold: two scorers share a name ({', '.join(judges)}); give each its own `name`"
            )
        if self.rewards and not any(reward.terms for reward in self.rewards):
            raise ValueError("rewards: none is trained on; give one a weight other than 0 without gold: true")
        if self.data.preferences_cache is not None and self.data.preferences is None:
            raise ValueError("data.preferences_cache: there is nothing to keep without data.preferences")
        if self.evaluation.every and self.seed == self.evaluation.seed:
            raise ValueError(
                f"evaluation.seed: {self.seed} is the run's own seed, so that evaluation would repeat training noise; "
                "choose another"
            )
        if self.evaluation.weights == "ema" and self.learner.ema_decay is None:
            raise ValueError("evaluation.weights: ema needs learner.ema_decay; set it, or evaluate `model`")
        if (lacking := self.lacking_for_ranks()) is not None:
            raise ValueError(f"learner.ranks: {lacking}")
        return self
