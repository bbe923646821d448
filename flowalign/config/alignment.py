"""The configuration of an alignment run, and the cross-checks that need no model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flowalign.config.section import Section
from flowalign.config.sections import (
    CacheConfig,
    ClusterConfig,
    DataConfig,
    LearnerConfig,
    LoggingConfig,
    ModelConfig,
    Positive,
    Resume,
    RewardConfig,
    RunName,
    SamplingConfig,
)


class RolloutConfig(Section):
    """``chunk_size`` is the fixed geometry of a rollout call: it, not the worker count, shapes the numbers.

    ``cache`` skips ODE steps before and after the window, never inside it.
    """

    chunk_size: Positive = 48
    decode_batch_size: Positive = 48
    cache: CacheConfig | None = None


class EvaluationConfig(SamplingConfig):
    """Same-seed evaluation every ``every`` iterations (0: never), before the first and after the last.

    ``gold`` lists scorers beside ``scorer``, which is GenEval by default: what the run was not trained on tells
    whether it has learned or found a gap in its reward.
    """

    every: Annotated[int, Field(ge=0)] = 20
    prompts: str = "shapes:eval"
    num_samples: Positive = 300
    seed: int = 1234
    scorer: RewardConfig | None = None
    gold: list[RewardConfig] = Field(default_factory=list)
    weights: Literal["policy", "ema"] = "policy"


class CheckpointConfig(Section):
    """``resume: step_000020`` goes back to that one; what came later is set aside, as everything is with ``never``.

    The highest ``best_metric`` of metrics.jsonl are kept; null is the overall of the evaluation's scorer.
    """

    every: Annotated[int, Field(ge=1)] = 20
    keep_last: Positive = 2
    keep_best: Annotated[int, Field(ge=0)] = 1
    best_metric: str | None = None
    resume: Resume = "auto"


class SafetyConfig(Section):
    """The limits of a collapse, judged block by block of ``window`` iterations; see docs/safety.md.

    ``min_diversity`` is a share of the first block's, ``max_saturation_shift`` a distance from the first block's,
    ``max_reward_drop`` is in standard deviations of the rewards, ``max_invalid`` a share of the images. Differences
    must also exceed ``standard_errors`` of theirs. ``clip``, a directory in open_clip's layout such as
    ``shapes:open_clip``, measures diversity on ``clip_images`` images an iteration; without it pixels do. With ``stop``
    a run ends once an alarm has held for ``patience`` blocks.
    """

    window: Annotated[int, Field(ge=3)] = 10
    min_diversity: Annotated[float, Field(ge=0, le=1)] = 0.5
    max_saturation_shift: Annotated[float, Field(ge=0, le=1)] = 0.2
    max_reward_drop: Annotated[float, Field(ge=0)] = 0.5
    max_invalid: Annotated[float, Field(ge=0, le=1)] = 0.1
    standard_errors: Annotated[float, Field(ge=0)] = 4.0
    clip: str | None = None
    clip_images: Annotated[int, Field(ge=2)] = 32
    stop: bool = False
    patience: Positive = 2


class AlignConfig(Section):
    """A whole alignment run. ``algorithm`` is parsed by the class that ``algorithm.type`` names."""

    name: RunName
    seed: Annotated[int, Field(ge=0)] = 0
    runs_dir: str = "runs"
    iterations: Positive
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    algorithm: dict[str, Any]
    rewards: list[RewardConfig] = Field(default_factory=list)
    rollout: RolloutConfig = RolloutConfig()
    learner: LearnerConfig = LearnerConfig()
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    safety: SafetyConfig = SafetyConfig()
    logging: LoggingConfig = LoggingConfig()
    min_valid_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5

    @model_validator(mode="after")
    def _together(self) -> AlignConfig:
        if "type" not in self.algorithm:
            raise ValueError("algorithm.type is missing: name the algorithm, e.g. flow_grpo")
        names = [reward.label for reward in self.rewards]
        if len(set(names)) != len(names):
            raise ValueError(f"rewards: two rewards share a name ({', '.join(names)}); give each its own `name`")
        judges = ["geneval" if self.evaluation.scorer is None else self.evaluation.scorer.label]
        judges += [reward.label for reward in self.evaluation.gold]
        if len(set(judges)) != len(judges):
            raise ValueError(
                f"evaluation.gold: two scorers share a name ({', '.join(judges)}); give each its own `name`"
            )
        if self.rewards and not any(reward.weight and not reward.gold for reward in self.rewards):
            raise ValueError("rewards: none is trained on; give one a weight other than 0 without gold: true")
        if self.data.preferences_cache is not None and self.data.preferences is None:
            raise ValueError("data.preferences_cache: there is nothing to keep without data.preferences")
        if self.learner.engine == "torch" and self.learner.zero_stage:
            raise ValueError("learner.zero_stage: ZeRO needs learner.engine=deepspeed")
        if self.evaluation.every and self.seed == self.evaluation.seed:
            raise ValueError(
                f"evaluation.seed: {self.seed} is the run's own seed, so that evaluation would repeat training noise; "
                "choose another"
            )
        if self.evaluation.weights == "ema" and self.learner.ema_decay is None:
            raise ValueError("evaluation.weights: ema needs learner.ema_decay; set it, or evaluate policy weights")
        if self.cluster.backend == "local" and self.learner.ranks > 1:
            raise ValueError("learner.ranks: cluster.backend=local runs one process; use backend=ray for more ranks")
        return self
