"""The sections of a configuration: pydantic models, unknown keys forbidden, and checks within one section.

No torch and no YAML here: a wrong configuration is refused in milliseconds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from flowalign.config.pathfamilies import PathFamilyName
from flowalign.config.section import Section
from flowalign.config.solvers import spelled
from flowalign.config.walk import Grid

Positive = Annotated[int, Field(ge=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
RunName = Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
NotNegative = Annotated[int, Field(ge=0)]
Resume = Annotated[str, BeforeValidator(lambda value: _resume(value))]
SHIPPED = Path(__file__).parent.parent / "shapes" / "assets"


def _resume(value: Any) -> str:
    """Turn ``20``, ``step_20`` and a path that ends so into ``step_000020``."""
    text = str(value)
    step = re.fullmatch(r"(?:(?:.*/)?step_)?(\d{1,12})/?", text)
    if step is not None and not isinstance(value, bool | float):
        return f"step_{int(step[1]):06d}"
    if text in ("auto", "never"):
        return text
    raise ValueError(f"got {value!r}; write auto, never, or the one to go back to, such as step_000020")


class LoraConfig(Section):
    """A PEFT LoRA on the transformer; ``targets`` null takes the model family's own list."""

    rank: Positive = 32
    alpha: Annotated[float, Field(gt=0)] = 64
    targets: Annotated[list[str], Field(min_length=1)] | None = None


Architecture = Literal["mmdit", "concat", "cross", "uvit"]


class TransformerConfig(Section):
    """A fresh network in place of the directory's own, ``64 * num_heads`` wide; ``num_heads`` null: ``num_layers``.

    ``mmdit`` is Stable Diffusion 3's, ``concat`` a DiT over text and image tokens in one sequence, ``cross`` a DiT with
    cross-attention to the text, ``uvit`` a ``concat`` with long skip connections (arXiv:2209.12152).
    (arXiv:2403.03206, sec. 4 and 5.3.1)
    """

    architecture: Architecture = "mmdit"
    num_layers: Positive = 4
    num_heads: Positive | None = None
    qk_norm: bool = True
    seed: Annotated[int, Field(ge=0)] = 0


InputName = Literal["r", "guidance"]


class ModelConfig(Section):
    """``path`` is a pipeline directory; ``shapes`` names the one that ships with the package.

    ``max_sequence_length`` is the length of the T5 part of the text (zeros where there is no T5). ``family`` says what
    the network's output means, ``inputs`` which numbers it takes beside the time: of both null takes what the directory
    records, which for one from elsewhere is ``rf`` and none. ``transformer`` begins with a fresh network.
    """

    type: str = "sd3"
    path: str = "shapes"
    max_sequence_length: Annotated[int, Field(ge=1, le=512)] = 256
    height: Positive | None = None
    width: Positive | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoraConfig | None = None
    family: PathFamilyName | None = None
    inputs: list[InputName] | None = None
    transformer: TransformerConfig | None = None

    @model_validator(mode="after")
    def _mmdit_alone_has_inputs(self) -> ModelConfig:
        if self.inputs and self.transformer is not None and self.transformer.architecture != "mmdit":
            raise ValueError("model.inputs: only an mmdit takes more inputs; leave them out")
        return self


def _texts(weights: Any) -> Any:
    """Turn whole numbers into texts: YAML reads them as numbers, but they are names of tasks like others."""
    if not isinstance(weights, dict):
        return weights
    return {str(task) if type(task) is int else task: weight for task, weight in weights.items()}


class DataConfig(Section):
    """``prompts`` is ``shapes:train``, ``shapes:eval`` or a GenEval-style jsonl file.

    ``task_weights`` gives a task (``tag``) that many groups for each one of a task that is not named; 0 leaves it out.
    ``preferences`` is a parquet file or a folder of pairs for an algorithm that learns from such, of which an iteration
    takes ``groups_per_iteration``; their latents are kept in ``preferences_cache``, by default a folder beside it.
    """

    prompts: str = "shapes:train"
    task_weights: Annotated[dict[str, NotNegative], BeforeValidator(_texts)] = Field(default_factory=dict)
    groups_per_iteration: Positive = 12
    preferences: str | None = None
    preferences_cache: str | None = None


class RewardConfig(Section):
    """One reward: what to run (a built-in name, ``file.py:attribute``, ``url:…``), its weight and its options.

    ``tasks`` routes: only prompts whose ``task`` (or ``tag``) is listed are scored by it. A ``gold`` reward is measured
    and never trained on: where the trained total rises while it falls, the run warns of reward hacking. With a
    ``runtime_env``, Ray's (``pip``, ``env_vars``, ``py_modules``, …), it runs in a process and environment of its own.
    """

    spec: str
    name: str | None = None
    weight: float = 1.0
    tasks: Annotated[list[str], Field(min_length=1)] | None = None
    gold: bool = False
    runtime_env: dict[str, Any] | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"spec": value} if isinstance(value, str) else value

    @property
    def label(self) -> str:
        """The name its score goes by: ``name``, else ``reward`` for ``file.py:reward``, else the spec."""
        return self.name or (self.spec.rpartition(":")[2] if ".py:" in self.spec else self.spec)


class OptimizerConfig(Section):
    """AdamW. The rate is constant after ``warmup_steps`` updates; with ``decay_steps`` it falls linearly and reaches
    ``final_learning_rate`` at that update.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay_steps: Positive | None = None
    final_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0


class LearnerConfig(Section):
    """``updates_per_iteration`` optimizer steps over ``epochs`` passes of one rollout's transitions."""

    engine: Literal["deepspeed", "torch"] = "deepspeed"
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    ranks: Positive = 1
    micro_batch_size: Positive = 48
    updates_per_iteration: Positive = 1
    epochs: Positive = 1
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None


class PatienceConfig(Section):
    """The seconds that an actor may be silent over a chunk, a score, an update or a sync before it counts as frozen.

    ``first_s`` to load, and for what was not done before in this run; then ``factor`` times the longest so far, and at
    least ``least_s``.
    """

    first_s: Annotated[float, Field(gt=0)] = 3600
    least_s: Annotated[float, Field(gt=0)] = 120
    factor: Annotated[float, Field(ge=1)] = 10


class ClusterConfig(Section):
    """The place where a run runs. Thread counts are explicit: on a CPU they decide both speed and bits.

    ``address`` null starts Ray on this machine; ``auto`` or ``host:port`` joins a running cluster. A reward that needs
    longer than ``reward_deadline_s`` for one chunk ends the run. ``teachers: actor`` loads each teacher once, in an
    actor that all learner ranks ask; ``learner`` loads all of them in every rank, as ``backend: local`` always does.
    """

    backend: Literal["ray", "local"] = "ray"
    address: str | None = None
    rollout_workers: Positive = 1
    reward_workers: Positive = 1
    rollout_cpus: Annotated[float, Field(ge=0)] = 1
    rollout_gpus: Annotated[float, Field(ge=0)] = 0
    reward_cpus: Annotated[float, Field(ge=0)] = 0.5
    reward_gpus: Annotated[float, Field(ge=0)] = 0
    learner_cpus: Annotated[float, Field(ge=0)] = 0.5
    learner_gpus: Annotated[float, Field(ge=0)] = 0
    teachers: Literal["actor", "learner"] = "actor"
    teacher_cpus: Annotated[float, Field(ge=0)] = 0.5
    teacher_gpus: Annotated[float, Field(ge=0)] = 0
    threads: Positive = 2
    reward_threads: Positive = 1
    reward_deadline_s: Annotated[float, Field(gt=0)] = 600
    device: str = "cpu"
    max_task_retries: Annotated[int, Field(ge=0)] = 3
    patience: PatienceConfig = PatienceConfig()

    @property
    def has_teacher_actors(self) -> bool:
        return self.backend == "ray" and self.teachers == "actor"


SolverName = Annotated[str, AfterValidator(spelled)]


class CacheConfig(Section):
    """TeaCache: a step whose input has changed by less than ``threshold`` reuses the last one's residual.

    ``calibration`` is a file of ``flowalign calibrate-cache``. (arXiv:2411.19108)
    """

    calibration: str
    threshold: Annotated[float, Field(gt=0)] = 0.1


class SamplingConfig(Section):
    """The way in which a model is sampled where nothing else is said.

    ``solver`` is a file of ``flow/solvers``, which solves the ODE: ``euler`` (for the diffusion families that is DDIM),
    ``heun``, ``dpmpp_2m``, with its options in parentheses where it has some. ``ddpm`` is ancestral with ``eta`` times
    the posterior's noise, ``consistency`` noises each prediction of the image anew. ``grid`` is of straight paths:
    ``pipeline``, the levels that the model's own pipeline walks, or ``paper``, K equal steps. A ``guidance_scale`` of 1
    or less is none, unless the network takes it as an input.
    """

    num_steps: Positive = 10
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    solver: SolverName = "euler"
    grid: Grid = "pipeline"
    eta: Annotated[float, Field(ge=0, le=1)] = 1.0
    cache: CacheConfig | None = None


class LoggingConfig(Section):
    wandb: Literal["offline", "online", "disabled"] = "offline"
    wandb_project: str = "flowalign"

    @field_validator("wandb", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "disabled" if value is None or str(value).lower() in ("false", "off", "no", "none") else value
