"""The sections that every run has, whatever it learns from, and what the loop asks of its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field

from flowalign.config.cluster import ClusterConfig
from flowalign.config.fields import MayChange, Resolved
from flowalign.config.logging import LoggingConfig
from flowalign.config.prompts import Given
from flowalign.config.section import Section
from flowalign.config.sections import (
    CacheConfig,
    ModelConfig,
    Positive,
    Resume,
    RewardConfig,
    RunName,
    SamplingConfig,
    Weights,
)
from flowalign.config.updates import UpdatesConfig

Precision = Literal["float32", "bfloat16"]
EMBEDDINGS = ".encoded"  # in the folder of run directories


class RolloutConfig(Section):
    """The geometry of rollouts, and where they have the prompts' embeddings from."""

    chunk_size: Positive = 48
    """Most samples of one rollout call; an alignment takes fewer where the last of its chunks is fuller then. It shapes
    the numbers, the count of workers does not. A chunk with fewer is filled up, and takes as long."""
    decode_batch_size: Positive = 48
    """Images that the autoencoder decodes at once. With 1 it needs room for one, which is decoded whole: tiles would be
    other pixels."""
    cache: CacheConfig | None = None
    """ODE steps before and after the window that are skipped, never one inside; null: none."""
    text_encoders: Annotated[Literal["keep", "drop", "never"], MayChange()] = "keep"
    """Text encoders of rollout workers. ``keep``: loaded, they encode prompts as these come. ``drop``: before the first
    iteration all prompts of the run that have no embedding on disk are encoded in a process that ends. ``never``: a
    prompt without an embedding on disk is refused.
    """
    embeddings: Annotated[str | None, Resolved("written"), MayChange()] = None
    """Folder of the prompts' embeddings, kept by content for all runs; null: `.encoded` in ``runs_dir``, and none where
    text encoders are kept.
    """

    @property
    def keeps_text_encoders(self) -> bool:
        return self.text_encoders == "keep"


class EvaluationConfig(SamplingConfig):
    """Evaluations on the same noises, and the way in which the model is sampled in them."""

    every: Annotated[int, Field(ge=0), MayChange()] = 20
    """Iterations from one to the next, beside one before the first and one after the last; 0: none at all."""
    prompts: Annotated[Given, Resolved("prompts")] = "shapes:eval"
    """As ``data.prompts``; the first ``num_samples`` of them are taken, again from the first where there are fewer."""
    num_samples: Positive = 300
    """Images of an evaluation."""
    seed: int = 1234
    """Seed of their noises."""
    scorer: RewardConfig | None = None
    """Judge of the images; null: ``geneval`` with ``mode: official``, and the strict verdict beside it."""
    gold: list[RewardConfig] = Field(default_factory=list)
    """Further judges. What a run was not trained on tells whether it has learned or found a gap in its reward."""
    weights: Weights = "model"
    """Weights that are evaluated; ``ema``: the average with ``learner.ema_decay``."""

    @property
    def judge(self) -> RewardConfig | None:
        """The configured scorer, else GenEval's official mode with the palette detector; None: there is none."""
        own = {"mode": "official", "detector": "palette"}
        return self.scorer or RewardConfig(spec="geneval", options=own)

    @property
    def judges(self) -> list[RewardConfig]:
        """The scorer, if there is one, and after it those that are only measured."""
        return [*filter(None, [self.judge]), *self.gold]


class CheckpointConfig(Section):
    """When checkpoints are written, and which are kept."""

    every: Positive = 20
    """Iterations from one to the next."""
    keep_last: Positive = 2
    """Newest checkpoints that are kept."""
    resume: Resume = "auto"
    """``step_000020``: back to that one, what came later is set aside. ``never``: a run that begins anew."""
    keep_best: Annotated[int, Field(ge=0)] = 1
    """Checkpoints of the best ``best_metric`` that are kept."""
    best_metric: str | None = None
    """Key of ``metrics.jsonl``, at its lowest where it is a loss, else at its highest; null: the overall of the
    evaluation's scorer.
    """


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


class Passes(NamedTuple):
    """How the learner goes through a batch: ``epochs`` times, each time in ``updates`` steps of micro-batches.

    Items are ``shuffled`` before; a short micro-batch is ``padded``, so that its network sees one geometry.
    """

    micro_batch_size: int
    updates: int = 1
    epochs: int = 1
    shuffled: bool = True
    padded: bool = True


class RunConfig(Section):
    """What every run has: `AlignConfig` and `PretrainConfig` say it with defaults of their own."""

    name: Annotated[RunName, MayChange()]
    """Name of the run, and of its directory."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything that is drawn, but for evaluations."""
    runs_dir: Annotated[str, Resolved("home"), MayChange()] = "runs"
    """Folder of run directories."""
    iterations: Annotated[Positive | None, MayChange()] = None
    """Iterations from the beginning of the run."""
    model: ModelConfig = ModelConfig()
    """The model to begin with."""
    algorithm: dict[str, Any]
    """``type`` names an algorithm; the other keys are its options."""
    rollout: RolloutConfig = RolloutConfig()
    """Geometry of rollouts."""
    learner: UpdatesConfig = UpdatesConfig()
    """Updates of the network."""
    cluster: ClusterConfig = ClusterConfig()
    """Place of the run."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluations on the way."""
    checkpoint: Annotated[CheckpointConfig, MayChange()] = CheckpointConfig()
    """Checkpoints."""
    logging: Annotated[LoggingConfig, MayChange()] = LoggingConfig()
    """Rows of the metrics, and copies of them."""

    @property
    def command(self) -> str:
        """The command that such a run is given by."""
        raise NotImplementedError

    @property
    def total(self) -> int:
        """Iterations in all; 0 where nobody says how many."""
        return self.iterations or 0

    @property
    def passes(self) -> Passes:
        raise NotImplementedError

    @property
    def batch_size(self) -> int | None:
        """Samples of an iteration, where the configuration alone says it."""
        return None

    @property
    def row_every(self) -> int:
        """Iterations from one row of the metrics to the next."""
        return 1

    @property
    def validates_every(self) -> int:
        """Iterations from one validation to the next; 0: none at all."""
        return 0

    @property
    def engine_dtype(self) -> Precision:
        """The precision in which the engine computes a loss."""
        return self.model.dtype

    @property
    def network_dtype(self) -> Precision:
        """The precision of a network's passes where that is not the loss's; their result is float32 then."""
        return "float32"

    @property
    def precisions(self) -> set[Precision]:
        """The precisions in which the network is called, by the learner and by rollouts."""
        passes = {self.model.dtype, self.engine_dtype, self.network_dtype}
        learner: Precision = "bfloat16" if "bfloat16" in passes else "float32"
        return {learner, self.model.dtype} if self.makes_images else {learner}

    @property
    def embeddings(self) -> Path:
        """The folder of embeddings of prompts."""
        return Path(self.rollout.embeddings or Path(self.runs_dir, EMBEDDINGS))

    @property
    def rollout_embeddings(self) -> Path | None:
        """The folder that rollouts read embeddings from; None: there is none."""
        named = self.rollout.embeddings is not None or not self.rollout.keeps_text_encoders
        return self.embeddings if named else None

    @property
    def model_as_trained(self) -> ModelConfig:
        """``model`` as it is sampled and exported."""
        return self.model

    @property
    def makes_images(self) -> bool:
        """True where something is rolled out, be it for evaluations alone."""
        return True

    @property
    def rollouts_compile(self) -> bool:
        """True where images are made by a compiled network, as the one that learns."""
        return False

    @property
    def trained_rewards(self) -> list[RewardConfig]:
        """What images are scored by while the model learns."""
        return []

    @property
    def limits(self) -> SafetyConfig:
        """The limits of a collapse."""
        return SafetyConfig()

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of update ``step``, counted from 0."""
        return self.learner.optimizer.learning_rate_at(step)

    @property
    def threads(self) -> int:
        return self.cluster.threads

    @property
    def device(self) -> str:
        return self.cluster.device

    @property
    def reward_device(self) -> str:
        return self.cluster.device if self.cluster.reward_gpus else "cpu"

    def lacking_for_ranks(self, processes: int = 1, otherwise: str = "") -> str | None:
        """Say all that must be set for the configured ranks where ``processes`` were started; None: nothing must.

        ``otherwise`` is another way to have them than Ray.
        """
        learner, needs = self.learner, []
        if learner.engine == "torch":
            needs.append("learner.engine=fsdp or deepspeed (torch is one process)")
        if self.cluster.backend == "local" and learner.ranks != processes:
            started = "one process" if processes == 1 else f"the {processes} processes that were started"
            needs.append(f"cluster.backend=ray{otherwise} (local is {started})")
        return f"{learner.ranks} ranks need {' and '.join(needs)}" if needs and learner.ranks > 1 else None

    def on(self, device: str) -> Self:
        """Return the same on another device."""
        return self.model_copy(update={"cluster": self.cluster.model_copy(update={"device": device})})
