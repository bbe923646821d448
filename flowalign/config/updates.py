"""How a network is updated: the optimizer, its engine, averages, and what a pass is cut into."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from flowalign.config.fields import MayBeAccepted, MayChange, Resolved
from flowalign.config.section import Section
from flowalign.config.sections import Positive

Beta = Annotated[float, Field(ge=0, lt=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
ActivationCheckpointing = Literal["none", "blocks", "selective"]
Offloading = Literal["none", "host", "disk"]
Compiling = bool | Literal["auto"]


class OptimizerConfig(Section):
    """AdamW, and its learning rate."""

    learning_rate: Annotated[float, Field(gt=0), MayBeAccepted()] = 1e-4
    """Learning rate after the warm-up."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decays of the two moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Least denominator of an update."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Share of each weight that an update takes away, times the learning rate."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Updates of the rise from 0 to the learning rate."""
    decay_steps: Positive | None = None
    """Updates of the fall to ``final_learning_rate``; null: a constant rate."""
    decay: Literal["linear", "cosine"] = "linear"
    """Shape of that fall."""
    final_learning_rate: Annotated[float, Field(ge=0), MayBeAccepted()] = 0.0
    """Learning rate from update ``decay_steps`` on."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Norm to which larger gradients are scaled down."""

    @property
    def of_adamw(self) -> dict[str, Any]:
        """The options that ``torch.optim.AdamW`` is made with; its learning rate is set before each update."""
        return {"betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of update ``step``, counted from 0."""
        rate = self.learning_rate
        if self.decay_steps:
            part = min(1.0, step / self.decay_steps)
            part = part if self.decay == "linear" else 0.5 * (1 - math.cos(math.pi * part))
            rate += (self.final_learning_rate - rate) * part
        if step >= self.warmup_steps:
            return rate
        return rate * (step + 1) / self.warmup_steps


class UpdatesConfig(Section):
    """The updates of the network that learns."""

    engine: Annotated[Literal["deepspeed", "fsdp", "torch"], MayChange()] = "deepspeed"
    """``deepspeed``; ``fsdp``, torch's own: all weights, gradients and the optimizer's state in shards; ``torch``: one
    rank."""
    zero_stage: Annotated[int, Field(ge=0, le=3), MayChange()] = 0
    """ZeRO of ``deepspeed``: 1 shards the optimizer's state over the ranks, 2 also the gradients, 3 also the weights.
    """
    ranks: Annotated[Positive, MayChange()] = 1
    """Data-parallel processes that learn."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
    ema_decay: Decay | Annotated[list[Decay], Field(min_length=1)] | None = None
    """Decay of the average of the weights, or of several: the first is ``ema``, another ``ema_0.99``; null: none."""
    ema_every: Positive = 1
    """Updates from one of the averages to the next."""
    ema_warmup: bool = False
    """A rise of the decays, as (1 + n) / (10 + n) after n updates of an average, so that it forgets the first weights.
    """
    activation_checkpointing: Annotated[ActivationCheckpointing, MayChange()] = "none"
    """What a backward pass computes anew in the place of keeping it; no bit changes. ``blocks``: all inside a
    transformer block. ``selective``: all but products of matrices and attention.
    """
    offload: Annotated[Offloading, MayChange()] = "none"
    """Where the optimizer's moments, averages and frozen blocks lie but for the piece at work; no bit changes.
    ``host``: pinned memory beside a GPU. ``disk``: mapped files.
    """
    offload_dir: Annotated[str | None, Resolved("written"), MayChange()] = None
    """Folder of the files of ``disk``, on a disk of the learner's machine; null: the run's own."""
    compile: Compiling = False
    """The network by ``torch.compile``; in an alignment for the learner and for rollouts, which stay exactly alike.
    ``auto``: where that pays back within the run, which is decided before it begins, and recorded.
    """

    @property
    def ema_decays(self) -> list[float]:
        if self.ema_decay is None:
            return []
        return self.ema_decay if isinstance(self.ema_decay, list) else [self.ema_decay]

    @property
    def compiles(self) -> bool:
        """True where the network is compiled; ``auto`` that nobody has decided is false."""
        return self.compile is True

    @property
    def hinders_compiling(self) -> str | None:
        """The key that no compiled network can go with, and why; None: there is none."""
        if self.zero_stage == 3 or self.engine == "fsdp":
            engine = "FSDP" if self.engine == "fsdp" else "ZeRO stage 3"
            return f"compile: {engine} cannot run a compiled network"
        if self.activation_checkpointing != "none":
            return "activation_checkpointing: a compiled network chooses this by itself"
        return "offload: a compiled network has no blocks to bring in" if self.offload != "none" else None

    @model_validator(mode="after")
    def _together(self) -> Self:
        if len(set(self.ema_decays)) != len(self.ema_decays):
            raise ValueError(f"ema_decay: {self.ema_decays} lists one average twice; leave one out")
        if self.engine != "deepspeed" and self.zero_stage:
            raise ValueError("zero_stage: ZeRO needs learner.engine=deepspeed")
        if self.compiles and (reason := self.hinders_compiling) is not None:
            raise ValueError(f"{reason}; turn one of them off")
        if self.offload_dir is not None and self.offload != "disk":
            raise ValueError(f"offload_dir: is of offload=disk, and offload is {self.offload}; leave it out")
        if self.zero_stage == 3 and self.activation_checkpointing == "selective":
            raise ValueError(
                "activation_checkpointing: ZeRO stage 3 changes in place what selective keeps; write blocks"
            )
        return self


class LearnerConfig(UpdatesConfig):
    """The updates of the policy."""

    micro_batch_size: Positive = 48
    """Most items of one forward and backward pass; fewer where the last then is fuller, see ``rollout.chunk_size``."""
    updates_per_iteration: Positive = 1
    """Optimizer steps of one pass over an iteration's items."""
    epochs: Positive = 1
    """Passes over an iteration's items."""
