"""The configuration of a training run on latents: base models, straightening, few-step students."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from flowalign.config.section import Section
from flowalign.config.sections import Beta, LoggingConfig, ModelConfig, Positive, Resume, RunName, SamplingConfig

Decay = Annotated[float, Field(ge=0, lt=1)]
TextLength = Annotated[int, Field(ge=1, le=512)]


class PhaseConfig(Section):
    """One stretch of pretraining; text lengths are drawn per step from ``max_sequence_lengths``.

    The rate falls along a cosine to ``final_learning_rate``, without which it is constant.
    """

    steps: Positive
    learning_rate: Annotated[float, Field(gt=0)]
    final_learning_rate: Annotated[float, Field(ge=0)]
    max_sequence_lengths: dict[TextLength, Annotated[float, Field(ge=0)]] = Field(
        default_factory=lambda: {16: 1.0}, min_length=1
    )

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
    """A bank of latents without noise of their own, of which each batch takes a ``fraction``."""

    latents: str
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.3


class ValidationConfig(Section):
    """Loss of the straight path's velocity on ``num_samples`` fixed latents, noises and times, every ``every`` steps.

    Sample i has its time in the middle of stratum i modulo ``num_times`` of [0, 1]. ``latents`` is a bank of its own.
    (arXiv:2403.03206, sec. 5.3: the validation loss of the scaling study)
    """

    latents: str
    every: Positive = 500
    num_samples: Positive = 512
    num_times: Positive = 8
    seed: Annotated[int, Field(ge=0)] = 4321


class PretrainConfig(Section):
    """A training run on precomputed latents: a base model, its straightening, or a student of a ``teacher``.

    ``ema_decay`` may list several averages: the first is ``ema``, another ``ema_0.99``. ``ema_every`` steps pass
    between two updates of them. A batch is split into micro-batches of ``micro_batch_size`` (null: all of it), whose
    gradients are accumulated. ``captions`` weights the bank's kinds of caption; empty takes the first.
    ``encoder_dropout`` replaces the output of single text encoders (``clip_l``, ``clip_g``, ``t5``) by that of the
    empty text, each with its own probability, so that one can be left out later (arXiv:2403.03206, sec. 5.3.3: 0.464
    each). ``resume: step_000020`` goes back to that checkpoint. ``sampling`` is recorded with the model, and is how it
    is sampled, with texts of the length in ``model_as_trained``. Under ``torchrun`` every process is one data-parallel
    rank.
    """

    name: RunName
    seed: Annotated[int, Field(ge=0)] = 0
    runs_dir: str = "runs"
    model: ModelConfig = ModelConfig()
    teacher: ModelConfig | None = None
    latents: str
    real_data: RealDataConfig | None = None
    encoder_dropout: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    captions: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    algorithm: dict[str, Any]
    batch_size: Positive = 128
    micro_batch_size: Positive | None = None
    phases: list[PhaseConfig]
    warmup_steps: Annotated[int, Field(ge=0)] = 200
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Decay | Annotated[list[Decay], Field(min_length=1)] = 0.9995
    ema_every: Positive = 1
    features: str = "shapes:open_clip"
    engine: Literal["torch", "deepspeed"] = "torch"
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    autocast: Literal["float32", "bfloat16"] = "bfloat16"
    compile: bool = False
    threads: Positive = 2
    device: str = "cpu"
    log_every: Positive = 50
    checkpoint_every: Positive = 1000
    keep_last: Positive = 2
    resume: Resume = "auto"
    validation: ValidationConfig | None = None
    sampling: SamplingConfig = SamplingConfig()
    logging: LoggingConfig = LoggingConfig(wandb="disabled")

    @property
    def ema_decays(self) -> list[float]:
        return self.ema_decay if isinstance(self.ema_decay, list) else [self.ema_decay]

    @property
    def model_as_trained(self) -> ModelConfig:
        """``model`` with the text length by which it is validated, sampled and exported: its own where the last phase
        draws that, else the one which that phase draws most often, the longer of two."""
        last = self.phases[-1].max_sequence_lengths if self.phases else {}
        drawn = {length: weight for length, weight in last.items() if weight}
        if not drawn or self.model.max_sequence_length in drawn:
            return self.model
        length = max(drawn, key=lambda length: (drawn[length], length))
        return self.model.model_copy(update={"max_sequence_length": length})

    @model_validator(mode="after")
    def _together(self) -> Self:
        if len(set(self.ema_decays)) != len(self.ema_decays):
            raise ValueError(f"ema_decay: {self.ema_decays} lists one average twice; leave one out")
        if self.engine == "torch" and self.zero_stage:
            raise ValueError("zero_stage: ZeRO needs engine=deepspeed")
        return self
