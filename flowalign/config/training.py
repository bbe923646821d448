"""The configuration of a training run on latents: base models, straightening, few-step students."""

# pyright: reportIncompatibleVariableOverride=false
# Sections are frozen, so that a field may be narrowed.

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from flowalign.config.cluster import ClusterConfig
from flowalign.config.fields import MayBeAccepted, MayChange, MayGrow, Resolved, Takes
from flowalign.config.logging import LoggingConfig, Wandb
from flowalign.config.prompts import Given
from flowalign.config.run import CheckpointConfig, EvaluationConfig, Passes, Precision, RunConfig
from flowalign.config.section import Section
from flowalign.config.sections import ModelConfig, Positive, RewardConfig, Weights
from flowalign.config.updates import Beta, Decay, OptimizerConfig, UpdatesConfig

TextLength = Annotated[int, Field(ge=1, le=512)]


class PhaseConfig(Section):
    """One stretch of training, with a rate that is constant or falls along a cosine."""

    iterations: Positive
    """Iterations of the phase."""
    learning_rate: Annotated[float, Field(gt=0), MayBeAccepted()]
    """Learning rate at its beginning."""
    final_learning_rate: Annotated[
        float, Field(ge=0), MayBeAccepted(), Takes("number, 0 or more", default="learning_rate")
    ]
    """Learning rate at its end."""
    max_sequence_lengths: dict[TextLength, Annotated[float, Field(ge=0)]] = Field(
        default_factory=lambda: {16: 1.0}, min_length=1
    )
    """Text lengths by their weights; each iteration draws one."""

    @field_validator("max_sequence_lengths")
    @classmethod
    def _one_is_drawn(cls, lengths: dict[int, float]) -> dict[int, float]:
        if not any(lengths.values()):
            raise ValueError("none has a weight above 0; give one, such as {16: 1.0}")
        return lengths

    @model_validator(mode="before")
    @classmethod
    def _constant_rate(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("final_learning_rate") is not None:
            return values
        return {**values, "final_learning_rate": values.get("learning_rate", 0.0)}


class RealDataConfig(Section):
    """Latents without noise of their own, mixed into the batches of pairs."""

    latents: Annotated[str, Resolved("bank")]
    """A bank of ``flowalign precompute``."""
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of each batch."""


class ValidationConfig(Section):
    """The loss of the straight path's velocity at fixed latents, noises and times, of the weights and of their average.
    (arXiv:2403.03206, sec. 5.3: the validation loss of the scaling study)
    """

    latents: Annotated[str, Resolved("bank")]
    """A bank of its own."""
    every: Positive = 500
    """Iterations from one validation to the next."""
    num_samples: Positive = 512
    """Latents that are looked at."""
    num_times: Positive = 8
    """Strata of [0, 1], in the middles of which lie the times."""
    seed: Annotated[int, Field(ge=0)] = 4321
    """Seed of the noises."""


class TrainingOptimizerConfig(OptimizerConfig):
    """AdamW, and its learning rate where no phase has its own."""

    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Decays of the two moments."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Share of each weight that an update takes away, times the learning rate."""
    warmup_steps: Annotated[int, Field(ge=0)] = 200
    """Updates of the rise from 0 to the learning rate."""


class TrainingLearnerConfig(UpdatesConfig):
    """The updates of the network, one an iteration."""

    engine: Annotated[Literal["torch", "fsdp", "deepspeed"], MayChange()] = "torch"
    """``torch``: one process; ``fsdp``, torch's own for several: all weights, gradients and the optimizer's state in
    shards; ``deepspeed``."""
    batch_size: Positive = 128
    """Latents of an iteration."""
    micro_batch_size: Positive | None = None
    """Latents of one forward and backward pass, whose gradients are accumulated; null: all at once."""
    optimizer: TrainingOptimizerConfig = TrainingOptimizerConfig()
    """AdamW."""
    ema_decay: Decay | Annotated[list[Decay], Field(min_length=1)] = 0.9995
    """Decay of the average of the weights, or of several: the first is ``ema``, another ``ema_0.99``."""
    ema_warmup: bool = True
    """A rise of the decays, as (1 + n) / (10 + n) after n updates of an average, so that it forgets the first weights.
    """
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the network's passes. Weights that are trained stay in float32."""


class TrainingClusterConfig(ClusterConfig):
    """The place where a run runs."""

    backend: Annotated[Literal["ray", "local"], MayChange()] = "local"
    """``local``: this process, or those that torchrun has started; ``ray``: ``learner.ranks`` actors."""


class TrainingEvaluationConfig(EvaluationConfig):
    """Images on the way, of the same noises, and the way in which the model is sampled, which is recorded with it."""

    every: Annotated[int, Field(ge=0), MayChange()] = 0
    """Iterations from one to the next, beside one before the first and one after the last; 0: none at all."""
    prompts: Annotated[Given | None, Resolved("prompts")] = None
    """As ``data.prompts`` of an alignment; null: captions of ``latents``."""
    num_samples: Positive = 24
    """Images of an evaluation."""
    scorer: RewardConfig | None = None
    """Judge of the images; null: none, they are looked at."""
    weights: Weights = "ema"
    """Weights that are evaluated; ``ema``: the first of the averages."""

    @property
    def judge(self) -> RewardConfig | None:
        return self.scorer


class TrainingCheckpointsConfig(CheckpointConfig):
    """When checkpoints are written, and which are kept."""

    every: Positive = 1000
    """Iterations from one to the next."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """Checkpoints of the best ``best_metric`` that are kept."""


class TrainingLoggingConfig(LoggingConfig):
    """The rows of ``metrics.jsonl``, and their copies for trackers."""

    every: Positive = 50
    """Iterations from one row to the next."""
    wandb: Wandb = "disabled"
    """``offline``: written beside the run, for ``wandb sync``. ``online``: sent while the run goes."""


class PretrainConfig(RunConfig):
    """A training run on precomputed latents: a base model, its straightening, or a student of a ``teacher``.

    It has ``iterations`` at the rate of its optimizer, or ``phases`` with rates of their own. Under ``torchrun`` every
    process is one data-parallel rank.
    """

    iterations: Annotated[Positive | None, MayChange()] = None
    """Iterations from the beginning of the run; null: those of its phases."""
    phases: Annotated[list[PhaseConfig], MayGrow()] = Field(default_factory=list)
    """Stretches of training, one after the other."""
    teacher: ModelConfig | None = None
    """Frozen model of a student that has one; null: none."""
    latents: Annotated[str, Resolved("bank")]
    """A bank of ``flowalign precompute``, or pairs of ``flowalign make-pairs``."""
    real_data: RealDataConfig | None = None
    """Latents with fresh noise beside pairs; null: none."""
    encoder_dropout: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    """Probability for each text encoder (``clip_l``, ``clip_g``, ``t5``) to be replaced by its output for the empty
    text, so that it can be left out later (arXiv:2403.03206, sec. 5.3.3: 0.464 each).
    """
    captions: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Weights of the bank's kinds of caption; empty: the first alone."""
    features: Annotated[str, Resolved("shipped")] = "shapes:open_clip"
    """Image tower of perceptual losses, a directory in open_clip's layout."""
    learner: TrainingLearnerConfig = TrainingLearnerConfig()
    """Updates of the network."""
    cluster: TrainingClusterConfig = TrainingClusterConfig()
    """Place of the run."""
    checkpoint: Annotated[TrainingCheckpointsConfig, MayChange()] = TrainingCheckpointsConfig()
    """Checkpoints."""
    validation: ValidationConfig | None = None
    """Loss on latents of its own; null: none."""
    evaluation: TrainingEvaluationConfig = TrainingEvaluationConfig()
    """Images on the way, and how the model is sampled."""
    logging: Annotated[TrainingLoggingConfig, MayChange()] = TrainingLoggingConfig()
    """Rows of the metrics, and copies of them."""

    @property
    def command(self) -> str:
        return "pretrain" if self.teacher is None else "distill"

    @property
    def total(self) -> int:
        return sum(phase.iterations for phase in self.stretches)

    @property
    def passes(self) -> Passes:
        """One update an iteration, in the order in which the bank was drawn from."""
        size = self.learner.micro_batch_size or self.learner.batch_size
        return Passes(size, shuffled=False, padded=False)

    @property
    def batch_size(self) -> int:
        return self.learner.batch_size

    @property
    def row_every(self) -> int:
        return self.logging.every

    @property
    def validates_every(self) -> int:
        return 0 if self.validation is None else self.validation.every

    @property
    def engine_dtype(self) -> Precision:
        return "float32"

    @property
    def network_dtype(self) -> Precision:
        return self.learner.dtype

    @property
    def makes_images(self) -> bool:
        return self.evaluation.every > 0

    @property
    def stretches(self) -> list[PhaseConfig]:
        """The phases; where there are none, one that is as long as the run."""
        if self.phases or self.iterations is None:
            return self.phases
        rates = self.learner.optimizer.model_dump(include={"learning_rate", "final_learning_rate"})
        return [PhaseConfig(iterations=self.iterations, **rates)]

    def phase_at(self, step: int) -> tuple[PhaseConfig, int]:
        """Return the phase of a step, both counted from 0, and the step's number within it."""
        for phase in self.stretches:
            if step < phase.iterations:
                return phase, step
            step -= phase.iterations
        raise ValueError(f"the last phase ends {step + 1} steps before that")

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up once, cosine within each phase; else the optimizer's."""
        if not self.phases:
            return super().learning_rate_at(step)
        if step >= self.total:
            return self.phases[-1].final_learning_rate
        phase, within = self.phase_at(step)
        turn = 0.5 * (1 + math.cos(math.pi * within / phase.iterations))
        rate = phase.final_learning_rate + (phase.learning_rate - phase.final_learning_rate) * turn
        return rate * min(1.0, (step + 1) / max(1, self.learner.optimizer.warmup_steps))

    @property
    def model_as_trained(self) -> ModelConfig:
        """``model`` with the text length by which it is validated, sampled and exported: its own where the last phase
        draws that, else the one which that phase draws most often, the longer of two."""
        last = self.stretches[-1].max_sequence_lengths if self.stretches else {}
        drawn = {length: weight for length, weight in last.items() if weight}
        if not drawn or self.model.max_sequence_length in drawn:
            return self.model
        length = max(drawn, key=lambda length: (drawn[length], length))
        return self.model.model_copy(update={"max_sequence_length": length})

    @model_validator(mode="after")
    def _together(self) -> Self:
        optimizer, fields = self.learner.optimizer, OptimizerConfig.model_fields
        rates = ("learning_rate", "final_learning_rate", "decay_steps", "decay")
        own = [name for name in rates if getattr(optimizer, name) != fields[name].default]
        if self.phases and self.iterations is not None:
            raise ValueError("iterations: each phase has its own; leave it out")
        if self.phases and own:
            raise ValueError(f"learner.optimizer.{own[0]}: each phase has its own rates; leave it out")
        if self.evaluation.every and self.seed == self.evaluation.seed:
            raise ValueError(f"evaluation.seed: {self.seed} is the run's own seed; choose another")
        return self
