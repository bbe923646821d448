"""The configuration of a training run on latents: base models, straightening, few-step students."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from flowalign.config.fields import MayBeAccepted, MayChange, MayGrow, Resolved, Takes
from flowalign.config.section import Section
from flowalign.config.sections import Beta, LoggingConfig, ModelConfig, Positive, Resume, RunName, SamplingConfig

Decay = Annotated[float, Field(ge=0, lt=1)]
TextLength = Annotated[int, Field(ge=1, le=512)]


class PhaseConfig(Section):
    """One stretch of training, with a rate that is constant or falls along a cosine."""

    steps: Positive
    """Steps of the phase."""
    learning_rate: Annotated[float, Field(gt=0), MayBeAccepted()]
    """Learning rate at its beginning."""
    final_learning_rate: Annotated[
        float, Field(ge=0), MayBeAccepted(), Takes("number, 0 or more", default="learning_rate")
    ]
    """Learning rate at its end."""
    max_sequence_lengths: dict[TextLength, Annotated[float, Field(ge=0)]] = Field(
        default_factory=lambda: {16: 1.0}, min_length=1
    )
    """Text lengths by their weights; each step draws one."""

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
    """Steps from one validation to the next."""
    num_samples: Positive = 512
    """Latents that are looked at."""
    num_times: Positive = 8
    """Strata of [0, 1], in the middles of which lie the times."""
    seed: Annotated[int, Field(ge=0)] = 4321
    """Seed of the noises."""


class PretrainConfig(Section):
    """A training run on precomputed latents: a base model, its straightening, or a student of a ``teacher``.

    Under ``torchrun`` every process is one data-parallel rank.
    """

    name: Annotated[RunName, MayChange()]
    """Name of the run, and of its directory."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything that is drawn."""
    runs_dir: Annotated[str, Resolved("home"), MayChange()] = "runs"
    """Folder of run directories."""
    model: ModelConfig = ModelConfig()
    """The model to begin with, and its text encoders and autoencoder."""
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
    algorithm: dict[str, Any]
    """``type`` names an algorithm; the other keys are its options."""
    batch_size: Positive = 128
    """Latents of a step."""
    micro_batch_size: Positive | None = None
    """Latents of one forward and backward pass, whose gradients are accumulated; null: all at once."""
    phases: Annotated[list[PhaseConfig], MayGrow()]
    """Stretches of training, one after the other."""
    warmup_steps: Annotated[int, Field(ge=0)] = 200
    """Steps of the rise from 0 to the first phase's rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Decays of AdamW's two moments."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Share of each weight that an update takes away, times the learning rate."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Norm to which larger gradients are scaled down."""
    ema_decay: Decay | Annotated[list[Decay], Field(min_length=1)] = 0.9995
    """Decay of the average of the weights, or of several: the first is ``ema``, another ``ema_0.99``."""
    ema_every: Positive = 1
    """Steps from one update of the averages to the next."""
    features: Annotated[str, Resolved("shipped")] = "shapes:open_clip"
    """Image tower of perceptual losses, a directory in open_clip's layout."""
    engine: Annotated[Literal["torch", "fsdp", "deepspeed"], MayChange()] = "torch"
    """``torch``: one process; ``fsdp``, torch's own for several: all weights, gradients and the optimizer's state in
    shards; ``deepspeed``."""
    zero_stage: Annotated[int, Field(ge=0, le=3), MayChange()] = 0
    """ZeRO of ``deepspeed``: 1 shards the optimizer's state over the ranks, 2 also the gradients, 3 also the weights.
    """
    autocast: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the network."""
    compile: bool = False
    """The network by ``torch.compile``."""
    threads: Positive = 2
    """Torch threads of a rank. On a CPU they decide both speed and bits."""
    device: str = "cpu"
    """``cpu``, ``cuda`` or ``cuda:N``."""
    log_every: Annotated[Positive, MayChange()] = 50
    """Steps from one row of ``metrics.jsonl`` to the next."""
    checkpoint_every: Annotated[Positive, MayChange()] = 1000
    """Steps from one checkpoint to the next."""
    keep_last: Annotated[Positive, MayChange()] = 2
    """Newest checkpoints that are kept."""
    resume: Annotated[Resume, MayChange()] = "auto"
    """``step_000020``: back to that checkpoint, what came later is set aside. ``never``: a run that begins anew."""
    validation: ValidationConfig | None = None
    """Loss on latents of its own; null: none."""
    sampling: SamplingConfig = SamplingConfig()
    """Recorded with the model: how ``sample`` and ``evaluate`` walk it."""
    logging: Annotated[LoggingConfig, MayChange()] = LoggingConfig(wandb="disabled")
    """Copies of the metrics."""

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
        if self.engine != "deepspeed" and self.zero_stage:
            raise ValueError("zero_stage: ZeRO needs engine=deepspeed")
        return self
