"""The configuration of an alignment run, and the cross-checks that need no model."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from flowalign.config.fields import MayChange, Resolved
from flowalign.config.section import Section
from flowalign.config.sections import (
    CacheConfig,
    CheckpointsConfig,
    ClusterConfig,
    DataConfig,
    LearnerConfig,
    LoggingConfig,
    ModelConfig,
    Positive,
    RewardConfig,
    RunName,
    SamplingConfig,
)


class RolloutConfig(Section):
    """The geometry of rollouts."""

    chunk_size: Positive = 48
    """Samples of one rollout call. It shapes the numbers, the count of workers does not."""
    decode_batch_size: Positive = 48
    """Images that the autoencoder decodes at once."""
    cache: CacheConfig | None = None
    """ODE steps before and after the window that are skipped, never one inside; null: none."""


class EvaluationConfig(SamplingConfig):
    """Evaluations on the same noises, and the way in which the model is sampled in them."""

    every: Annotated[int, Field(ge=0), MayChange()] = 20
    """Iterations from one to the next, beside one before the first and one after the last; 0: none at all."""
    prompts: Annotated[str, Resolved("prompts")] = "shapes:eval"
    """``shapes:train``, ``shapes:eval`` or a jsonl file with a ``prompt`` in each row."""
    num_samples: Positive = 300
    """Images of an evaluation."""
    seed: int = 1234
    """Seed of their noises."""
    scorer: RewardConfig | None = None
    """Judge of the images; null: ``geneval``."""
    gold: list[RewardConfig] = Field(default_factory=list)
    """Further judges. What a run was not trained on tells whether it has learned or found a gap in its reward."""
    weights: Literal["policy", "ema"] = "policy"
    """Weights that are evaluated; ``ema``: the average with ``learner.ema_decay``."""


class CheckpointConfig(CheckpointsConfig):
    """When checkpoints are written, and which are kept."""

    keep_best: Annotated[int, Field(ge=0)] = 1
    """Checkpoints of the highest ``best_metric`` that are kept."""
    best_metric: str | None = None
    """Key of ``metrics.jsonl``; null: the overall of the evaluation's scorer."""


class SafetyConfig(Section):
    """The limits of a collapse, judged block by block; see docs/safety.md."""

    window: Annotated[int, Field(ge=3), MayChange()] = 10
    """Iterations of a block."""
    min_diversity: Annotated[float, Field(ge=0, le=1), MayChange()] = 0.5
    """Least diversity, as a share of the first block's."""
    max_saturation_shift: Annotated[float, Field(ge=0, le=1), MayChange()] = 0.2
    """Largest distance of the saturation from the first block's."""
    max_reward_drop: Annotated[float, Field(ge=0), MayChange()] = 0.5
    """Largest fall of a group's best reward below the best block's, in standard deviations of the rewards."""
    max_invalid: Annotated[float, Field(ge=0, le=1), MayChange()] = 0.1
    """Largest share of images with a reward that is NaN, infinite or beyond a million."""
    standard_errors: Annotated[float, Field(ge=0), MayChange()] = 4.0
    """Standard errors that a difference must also exceed."""
    clip: Annotated[str | None, Resolved("shipped")] = None
    """A directory in open_clip's layout, such as ``shapes:open_clip``, whose features measure diversity; null: pixels.
    """
    clip_images: Annotated[int, Field(ge=2)] = 32
    """Images of an iteration that ``clip`` looks at."""
    stop: Annotated[bool, MayChange()] = False
    """End of the run once an alarm has held for ``patience`` blocks."""
    patience: Annotated[Positive, MayChange()] = 2
    """Blocks in a row that an alarm has to hold."""


class AlignConfig(Section):
    """A whole alignment run."""

    name: Annotated[RunName, MayChange()]
    """Name of the run, and of its directory."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything that is drawn, but for evaluations."""
    runs_dir: Annotated[str, Resolved("home"), MayChange()] = "runs"
    """Folder of run directories."""
    iterations: Annotated[Positive, MayChange()]
    """Iterations from the beginning of the run."""
    model: ModelConfig = ModelConfig()
    """The model to align."""
    data: DataConfig = DataConfig()
    """Prompts, or pairs."""
    algorithm: dict[str, Any]
    """``type`` names an algorithm; the other keys are its options."""
    rewards: list[RewardConfig] = Field(default_factory=list)
    """What the images are scored by."""
    rollout: RolloutConfig = RolloutConfig()
    """Geometry of rollouts."""
    learner: LearnerConfig = LearnerConfig()
    """Updates of the policy."""
    cluster: ClusterConfig = ClusterConfig()
    """Place of the run."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluations on the way."""
    checkpoint: Annotated[CheckpointConfig, MayChange()] = CheckpointConfig()
    """Checkpoints."""
    safety: SafetyConfig = SafetyConfig()
    """Limits of a collapse."""
    logging: Annotated[LoggingConfig, MayChange()] = LoggingConfig()
    """Copies of the metrics."""
    min_valid_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Least share of an iteration's images with a usable score, below which the run ends."""

    @property
    def threads(self) -> int:
        return self.cluster.threads

    @property
    def device(self) -> str:
        return self.cluster.device

    @property
    def reward_device(self) -> str:
        return self.cluster.device if self.cluster.reward_gpus else "cpu"

    def on(self, device: str) -> Self:
        """Return the same on another device."""
        return self.model_copy(update={"cluster": self.cluster.model_copy(update={"device": device})})

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
        if self.learner.engine != "deepspeed" and self.learner.zero_stage:
            raise ValueError("learner.zero_stage: ZeRO needs learner.engine=deepspeed")
        if self.learner.engine == "torch" and self.learner.ranks > 1:
            raise ValueError("learner.engine: torch is one process; use fsdp for more ranks")
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
