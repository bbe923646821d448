"""The sections of a configuration: pydantic models, unknown keys forbidden, and checks within one section.

No torch and no YAML here: a wrong configuration is refused in milliseconds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from flowalign.config.curriculum import CurriculumConfig
from flowalign.config.fields import MayChange, Resolved, Takes
from flowalign.config.guidance import GuidanceKeys
from flowalign.config.pathfamilies import PathFamilyName
from flowalign.config.prompts import Given
from flowalign.config.section import Section
from flowalign.config.solvers import spelled
from flowalign.config.walk import Grid

Positive = Annotated[int, Field(ge=1)]
RunName = Annotated[
    str, Field(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"), Takes("letters, digits, `.`, `_` and `-`")
]
Resume = Annotated[
    str,
    BeforeValidator(lambda value: _resume(value)),
    Takes("`auto`, `never`, or a checkpoint such as `step_000020`"),
    WithJsonSchema({"type": ["string", "integer"]}),
]
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
    """A PEFT LoRA on the transformer."""

    path: Annotated[str | None, Resolved()] = None
    """An adapter to begin from, a folder or a file, in PEFT's layout or in diffusers'; its rank, alpha and targets are
    the run's. Null: a fresh one, which changes nothing.
    """
    rank: Positive = 32
    """Rank of the two factors."""
    alpha: Annotated[float, Field(gt=0)] = 64
    """Scale of their product, as ``alpha / rank``."""
    targets: Annotated[list[str], Field(min_length=1)] | None = None
    """Layers that have one, by the ends of their names; null: the model family's own list."""

    @property
    def is_settled(self) -> bool:
        """True where rank, alpha and targets are all given, as a run records them."""
        return {"rank", "alpha"} <= self.model_fields_set and self.targets is not None

    @property
    def described(self) -> str:
        """Rank and alpha, and the name of the adapter that it begins from."""
        begun = "" if self.path is None else f", begun from {Path(self.path).name}"
        return f"LoRA, rank {self.rank}, alpha {self.alpha:g}{begun}"


Architecture = Literal["mmdit", "concat", "cross", "uvit"]


class TransformerConfig(Section):
    """A fresh network in place of the directory's own, ``64 * num_heads`` wide. (arXiv:2403.03206, sec. 4 and 5.3.1)"""

    architecture: Architecture = "mmdit"
    """``mmdit``: Stable Diffusion 3's. ``concat``: a DiT over text and image tokens in one sequence. ``cross``: a DiT
    with cross-attention to the text. ``uvit``: ``concat`` with long skip connections (arXiv:2209.12152).
    """
    num_layers: Positive = 4
    """Number of blocks."""
    num_heads: Positive | None = None
    """Attention heads of a block; null: as many as blocks."""
    qk_norm: bool = True
    """RMS norm of queries and keys."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the first weights."""

    @property
    def heads(self) -> int:
        return self.num_layers if self.num_heads is None else self.num_heads


InputName = Literal["r", "guidance"]
AttentionKernel = Literal["auto", "math", "efficient", "flash", "cudnn"]
BaseDtype = Literal["float32", "bfloat16", "int8"]


class ModelConfig(Section):
    """The model that a run begins from."""

    type: str | None = None
    """Model family: its name in ``flowalign/models/families``, or ``package.module`` of your own; null: that of the
    directory's pipeline.
    """
    path: Annotated[str, Resolved("pipeline")] = "shapes"
    """A pipeline directory; ``shapes``: the one that ships with the package."""
    max_sequence_length: Annotated[int, Field(ge=1, le=512)] = 256
    """Tokens of a text: the most where texts have lengths of their own; where CLIP and T5 read it those of T5's part,
    zeros where there is no T5.
    """
    height: Positive | None = None
    """Height of the images in pixels; null: the model's own."""
    width: Positive | None = None
    """Width of the images in pixels; null: the model's own."""
    negative_prompt: str | None = None
    """What guidance leads away from, where a row of the prompts has no ``negative_prompt`` of its own; null: what the
    model's pipeline takes, mostly the empty text.
    """
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation. Weights that are trained stay in float32."""
    attention: AttentionKernel = "auto"
    """Torch's kernel of the network's attention, of rollouts and learner alike. ``auto``: torch's choice. ``math``:
    plain products, anywhere. ``flash``: a CPU, or a GPU in bfloat16 without masks. ``efficient``, ``cudnn``: a GPU.
    """
    lora: LoraConfig | None = None
    """A LoRA that is trained in place of all weights."""
    base_dtype: BaseDtype | None = None
    """Precision in which a LoRA's frozen base is stored, in rollouts and learner alike; null: ``dtype``. ``int8``:
    linear layers of the blocks, one scale an output.
    """
    family: PathFamilyName | None = None
    """Meaning of the network's output; null: as the directory records it, else ``rf``."""
    inputs: list[InputName] | None = None
    """Numbers that the network takes beside the time; null: as the directory records it, else none."""
    transformer: TransformerConfig | None = None
    """A fresh network to begin with; null: the directory's own."""

    @model_validator(mode="after")
    def _together(self) -> ModelConfig:
        if self.inputs and self.transformer is not None and self.transformer.architecture != "mmdit":
            raise ValueError("model.inputs: only an mmdit takes more inputs; leave them out")
        if self.base_dtype is not None and self.lora is None:
            raise ValueError(
                f"base_dtype: {self.base_dtype} is of what a LoRA leaves frozen, and all weights are trained; "
                "train a model.lora, or leave it out"
            )
        return self


def _texts(weights: Any) -> Any:
    """Turn whole numbers into texts: YAML reads them as numbers, but they are names of tasks like others."""
    if not isinstance(weights, dict):
        return weights
    return {str(task) if type(task) is int else task: weight for task, weight in weights.items()}


def _size(text: object) -> object:
    if not isinstance(text, str) or re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", text) is None:
        raise ValueError(f"got {text!r}; write HEIGHTxWIDTH in pixels, such as 512x768")
    return text


class DataConfig(Section):
    """The prompts, or the pairs, that a run learns from."""

    prompts: Annotated[Given, Resolved("prompts")] = "shapes:train"
    """``shapes:train``, ``shapes:eval``, a file or a folder of prompts, ``hub:owner/name``; or a section that says
    which of its rows and columns.
    """
    task_weights: Annotated[dict[str, Annotated[int, Field(ge=0, le=1000)]], BeforeValidator(_texts)] = Field(
        default_factory=dict
    )
    """Groups of a task (``task``, else ``tag``) for each one of a task without a weight; none with 0."""
    curriculum: CurriculumConfig | None = None
    """Draw by pass rate; null: all prompts of a task in turn, whatever they scored."""
    groups_per_iteration: Positive = 12
    """Groups of an iteration: prompts with their images, or pairs of ``preferences``."""
    refill: Annotated[int, Field(ge=0, le=16)] = 0
    """Draws of an iteration at most, beside the first, of new prompts for groups whose images all score alike and teach
    nothing; 0: none. The groups that are drawn beside the first are learned from as they are. (DAPO, arXiv:2503.14476)
    """
    sizes: list[Annotated[str, BeforeValidator(_size)]] = Field(default_factory=list)
    """Sizes of the images in pixels, HEIGHTxWIDTH, of which each group draws one; none: the model's own.
    Evaluations keep to ``model.height`` and ``model.width``."""
    preferences: Annotated[str | None, Resolved()] = None
    """A parquet file or a folder of pairs, for an algorithm that learns from pairs."""
    preferences_cache: Annotated[str | None, Resolved("written"), MayChange()] = None
    """Folder of the pairs' latents; null: one beside the pairs."""

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """Return ``sizes`` as (height, width)."""
        return [(int(height), int(width)) for height, _, width in (size.partition("x") for size in self.sizes)]


PATH_OPTIONS = ("path", "processor", "checkpoint", "head")  # of a scorer, wherever they stand in its options


class RewardConfig(Section):
    """One reward of a run, or one scorer of its evaluations. A text alone is its ``spec``."""

    stands_for: ClassVar = {"type": "string"}
    spec: Annotated[str, Resolved("code")]
    """Name of a scorer, ``file.py:attribute``, ``package.module:attribute``, or ``url:`` and the address of a server.
    """
    name: str | None = None
    """Name of its score; null: that of a scorer or an attribute, else the ``spec``."""
    weight: float = 1.0
    """Weight in the total that is trained on; of ``rewards`` alone."""
    parts: dict[Annotated[str, Field(min_length=1)], float] = Field(default_factory=dict)
    """Weights of further scores of the reward, each of which is then trained on as a reward of its own; of ``rewards``
    alone. Where such a score is NaN and the main one is not, it does not apply.
    """
    tasks: Annotated[list[str], Field(min_length=1)] | None = None
    """Tasks (``task``, else ``tag``) of the prompts that it scores; null: all."""
    gold: bool = False
    """Measured and never trained on. Where the trained total rises while it falls, the run warns of reward hacking."""
    runtime_env: dict[str, Any] | None = None
    """Ray's, such as ``pip``, ``env_vars`` and ``py_modules``: a process and an environment of its own."""
    options: Annotated[dict[str, Any], Resolved("options")] = Field(default_factory=dict)
    """Options of the scorer."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"spec": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _parts_fit(self) -> RewardConfig:
        if self.gold and self.parts:
            raise ValueError("parts: nothing of a gold reward is trained on; leave one of the two out")
        if self.label in self.parts:
            raise ValueError(f"parts: {self.label} is the main score, whose weight is `weight`")
        return self

    @property
    def terms(self) -> dict[str, float]:
        """Weights in the total by score, its own and those of its parts, where they are not 0."""
        weights = {} if self.gold else {self.label: self.weight, **self.parts}
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def label(self) -> str:
        """The name its score goes by: ``name``, else ``reward`` for ``file.py:reward``, else the spec."""
        return self.name or (self.spec.rpartition(":")[2] if ".py:" in self.spec else self.spec)


OLDER_WEIGHTS = "policy"  # what evaluations and rollouts called ``model``


def weights_name(name: Any) -> Any:
    """Return the name of weights: ``model``, or that of an average; ``policy`` is the former name of ``model``."""
    return "model" if name == OLDER_WEIGHTS else name


Weights = Annotated[Literal["model", "ema"], BeforeValidator(weights_name)]
SolverName = Annotated[str, AfterValidator(spelled), Takes("a solver, such as `heun`")]


class CacheConfig(Section):
    """TeaCache: steps whose input has hardly changed skip the network's blocks. A text alone is its ``calibration``.
    (arXiv:2411.19108)"""

    calibration: Annotated[str, Resolved()]
    """A file of ``flowalign calibrate-cache``."""
    threshold: Annotated[float, Field(gt=0)] = 0.1
    """Change of the input below which a step takes the last one's residual."""

    @model_validator(mode="before")
    @classmethod
    def _file_alone(cls, value: Any) -> Any:
        return {"calibration": value} if isinstance(value, str) else value


class SamplingConfig(GuidanceKeys, Section):
    """The way in which a model is sampled where nothing else is said."""

    num_steps: Positive = 10
    """Steps of a walk."""
    solver: SolverName = "euler"
    """An ODE solver of ``flow/solvers``, with its options in parentheses where it has some: ``euler`` (DDIM for the
    diffusion families), ``heun``, ``ab2``, ``dpmpp_2m``. ``ddpm``: ancestral. ``consistency``: each prediction of the
    image is noised anew.
    """
    grid: Grid = "pipeline"
    """Levels of a walk on the straight path. ``pipeline``: those of the model's own pipeline. ``paper``: equal steps.
    """
    eta: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the posterior's noise that ``ddpm`` adds."""
    cache: CacheConfig | None = None
    """Steps that are skipped; null: none."""
