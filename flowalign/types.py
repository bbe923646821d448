"""Frozen dataclasses that cross modules.

Shapes: N samples, P distinct prompts, S stored SDE steps, K schedule steps, C H W latents, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowalign.conditions import Condition, Conditions
from flowalign.rows import Rows

SdeKind = Literal["ode", "flow", "dance", "cps", "ddpm"]
UNTAGGED = "untagged"  # in the names of metrics: the task of a prompt that names none


class SampleShape(NamedTuple):
    """What one batch of a network has in common: (height, width) in pixels, None being the model's own, and the numbers
    of tokens of the text and of the negative text, 0 where all texts have one length."""

    size: tuple[int, int] | None
    text: int
    negative: int


@dataclass(frozen=True)
class PromptBatch:
    """N samples to make: prompt, group and sample id of each; groups are keyed by id, never by text.

    ``negatives`` are their negative prompts, () where all have that of the model's family. ``shapes`` say what can be
    in one batch, () where all are alike.
    """

    prompts: tuple[str, ...]
    group_ids: tuple[int, ...]
    sample_ids: tuple[int, ...]
    metadata: tuple[Mapping[str, Any], ...]
    negatives: tuple[str, ...] = ()
    shapes: tuple[SampleShape, ...] = ()

    def __post_init__(self) -> None:
        own = (
            self.prompts,
            self.group_ids,
            self.sample_ids,
            self.metadata,
            *filter(None, (self.negatives, self.shapes)),
        )
        lengths = {*map(len, own)}
        if len(lengths) != 1:
            raise ValueError(f"PromptBatch fields differ in length: {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.prompts)

    def chunks(self, size: int) -> list[PromptBatch]:
        """Return consecutive pieces of ``size`` samples of one shape: the fixed geometry of a rollout."""
        kinds = self.shapes or (None,) * len(self)
        ends = [i for i in range(1, len(self)) if kinds[i] != kinds[i - 1]]
        pieces = zip([0, *ends], [*ends, len(self)], strict=True)
        return [self.take(range(i, min(i + size, end))) for begin, end in pieces for i in range(begin, end, size)]

    def take(self, index: Sequence[int]) -> PromptBatch:
        """Return a selection of the samples."""
        own = (getattr(self, name) for name in self.__dataclass_fields__)
        return PromptBatch(*(tuple(values[i] for i in index) if values else () for values in own))

    @property
    def kinds(self) -> Tensor:
        """The number of each sample's shape among those that there are, (N,)."""
        places = {shape: place for place, shape in enumerate(dict.fromkeys(self.shapes))}
        return torch.tensor([places[shape] for shape in self.shapes]) if places else torch.zeros(len(self)).long()


def task_of(row: Mapping[str, Any]) -> str:
    """Return the word by which a prompt is drawn and rewards and teachers know it: its ``task``, else its ``tag``."""
    return str(row.get("task") or row.get("tag") or "")


def judged_task(row: Mapping[str, Any]) -> str:
    """Return the word by which evaluations group a prompt: its ``tag``, as in GenEval's rows, else its ``task``."""
    return str(row.get("tag") or row.get("task") or "")


@dataclass(frozen=True)
class CacheRule:
    """TeaCache's rule: ``threshold`` of the accumulated change, and the polynomial that predicts it, constant first."""

    threshold: float
    coefficients: tuple[float, ...]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: its ``scale``, a float or (N,), where 1 or less is none.

    A network that takes the scale as an input is handed it as it is, and guided by two passes at ``true_scale``. With
    ``norm_preserving`` each token of the guided velocity keeps the length of the conditional one; with ``norm_cap`` the
    whole of it is at most so many times as long. Guidance ends where 1 - t is beyond ``until``.
    """

    scale: float | Tensor = 1.0
    norm_preserving: bool = False
    true_scale: float = 1.0
    norm_cap: float | None = None
    until: float = 1.0


@dataclass(frozen=True)
class Noise:
    """The steps of ``window``, a half-open range, are of ``kind`` and ``level``; all others are ODE steps.

    What is learned from lies in the window: its states are kept, and the log-probs of steps with noise in the form
    ``log_prob``. By default the window is empty.
    """

    kind: SdeKind = "ode"
    level: float = 0.0
    window: tuple[int, int] = (0, 0)
    log_prob: Literal["gaussian", "unnormalised"] = "gaussian"

    @property
    def num_steps(self) -> int:
        """Steps of the window."""
        return self.window[1] - self.window[0]


@dataclass(frozen=True)
class Branching:
    """The part that the samples of a group have in common, and the number of images that each of them becomes.

    With ``shared_noise`` all samples of a group start alike; with ``shared_prefix`` as well, the steps before the
    window are computed once a group. Every sample is finished once for each of ``granularities``: by that many of the
    remaining steps at a time.
    """

    shared_noise: bool = False
    shared_prefix: bool = False
    granularities: tuple[int, ...] = (1,)

    def samples_of_images(self, count: int) -> list[int]:
        """Return of ``count`` samples the sample of each image."""
        return [sample for sample in range(count) for _ in self.granularities]


@dataclass(frozen=True)
class SamplingPlan:
    """The plan of one iteration's trajectories; everything a replay needs besides the weights.

    ``sigmas`` are the K+1 noise levels, 1 to 0. ``solver``, a name of ``flow.solvers`` with its options, takes the ODE
    steps. With ``average_velocity`` the network is also given the time that a step leads to. ``initial_scale`` is the
    standard deviation of the first state, other than 1 where ``sigmas`` begin below 1. With ``keep_means`` the means of
    the window's steps are kept. With ``cache`` ODE steps skip the network where little changes, and never those of the
    window. ``by_size`` has other levels for the image sizes, (height, width), that the pipeline walks otherwise.
    """

    sigmas: tuple[float, ...]
    noise: Noise = Noise()
    guidance: Guidance = Guidance()
    branching: Branching = Branching()
    solver: str = "euler"
    average_velocity: bool = False
    initial_scale: float = 1.0
    keep_means: bool = False
    cache: CacheRule | None = None
    by_size: tuple[tuple[tuple[int, int], tuple[float, ...]], ...] = ()

    def at(self, size: tuple[int, int] | None) -> SamplingPlan:
        """Return the plan of the walks of one image size."""
        return replace(self, sigmas=dict(self.by_size).get(size, self.sigmas) if size else self.sigmas, by_size=())

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def sigma_max(self) -> float:
        """The second sigma: what replaces t = 1 in the flow kind's denominator."""
        return self.sigmas[1]


@dataclass(frozen=True)
class Pictures:
    """What is scored: N images, uint8 (N, H, W, 3), and whose they are.

    ``final_NCHW`` are the latents that they were decoded from, where a reward needs them.
    """

    batch: PromptBatch
    images: Tensor
    final_NCHW: Tensor | None = None

    def __len__(self) -> int:
        return len(self.batch)


@dataclass(frozen=True)
class Trajectories:
    """What is learned from: the walks of N samples, complete enough to recompute their log-probs exactly.

    ``states_NSCHW`` has S+1 states: before each step of the window and after its last (S may be 0).
    ``log_prob_NS`` is a mean over dimensions; ``means_NSCHW`` are the rollout's own step means, if
    the plan kept them; ``final_NCHW`` is the latent at t = 0. Those of several chunks are `Rows`, and their condition
    `Conditions`. All tensors may lie in memory that others share, so that nobody writes to them.

    With J granularities there are N·J images, the J of one sample in a row. Then ``batch``, ``condition``,
    ``final_NCHW``, the pictures and the scores have a row an image, so that each is scored like any other; states,
    log-probs and means have a row a sample.

    With a cache ``computed`` and ``reused`` count the network's evaluations that went through its blocks, and not.
    """

    batch: PromptBatch
    condition: Condition | Conditions
    plan: SamplingPlan
    states_NSCHW: Tensor | Rows
    log_prob_NS: Tensor
    final_NCHW: Tensor | Rows
    seed: int
    policy_version: int
    means_NSCHW: Tensor | Rows | None = None
    computed: int = 0
    reused: int = 0

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def kinds_N(self) -> Tensor:
        """The number of each sample's shape, (N,)."""
        return self.batch.kinds[:: len(self.plan.branching.granularities)]

    def of_kind(self, kind: int) -> Trajectories:
        """Return the same samples with the plan of those of one shape, which alone may then be asked for."""
        shapes = list(dict.fromkeys(self.batch.shapes))
        return replace(self, plan=self.plan.at(shapes[kind].size)) if shapes else self


class Samples(NamedTuple):
    """Samples that were just made: what is scored of them, and what is learned from."""

    pictures: Pictures
    trajectories: Trajectories


@dataclass(frozen=True)
class Preview:
    """What the driver sees of N images.

    ``thumbnails`` are uint8 (N, h, w, 3), every n-th pixel of each; ``images`` are whole ones, (H, W, 3), by their
    position, of the few that are looked at. ``computed`` and ``reused`` are those of `Trajectories`, ``seconds`` what
    it took to make them.
    """

    thumbnails: NDArray[np.uint8]
    images: Mapping[int, NDArray[np.uint8]]
    computed: int = 0
    reused: int = 0
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.thumbnails)


@dataclass(frozen=True)
class Scores:
    """Rewards of N samples: float32 (N,) by name, their weighted total, and which samples are valid.

    Where ``valid`` is False the total is NaN and must never be used; ``causes`` counts why. A reward is NaN where it
    was refused, or does not apply to a sample's task. ``weights`` are those of the rewards that are trained on;
    ``retries`` counts by reward and cause what had to be asked again. ``applies`` says, of rewards that are for some
    tasks only, which samples they are for. ``owners`` says which reward answered a score.
    """

    by_reward: Mapping[str, Tensor]
    total: Tensor
    valid: Tensor
    causes: Mapping[str, int] = field(default_factory=dict)
    retries: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    applies: Mapping[str, Tensor] = field(default_factory=dict)
    owners: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LatentBatch:
    """Clean latents (N, C, H, W) and their condition: what the pretraining losses consume.

    ``noise_NCHW`` is given where each latent belongs to its own noise, as in the pairs of a reflow.
    """

    latents_NCHW: Tensor
    condition: Condition
    seed: int
    noise_NCHW: Tensor | None = None


@dataclass(frozen=True)
class PreferencePairs:
    """Winner and loser latents (N, C, H, W) of N prompts."""

    winner_NCHW: Tensor
    loser_NCHW: Tensor
    condition: Condition
    seed: int


@dataclass(frozen=True)
class EncodedPrompts:
    """N samples that the learner makes by itself; `initial_noise` of the run's ``seed`` is that of a rollout."""

    batch: PromptBatch
    condition: Condition
    latent_shape: tuple[int, int, int]
    seed: int


@dataclass(frozen=True)
class Credit:
    """The M items that a batch is learned from, and what each of them is worth.

    ``sample`` names the row of the batch that an item is of, (M,), or (M, G) where an item is a whole group.
    ``tensors``, small ones with leading dimension M, say what else tells it from others (its step, its point) and what
    it is worth (its advantage). ``total`` is the number of items that a mean is taken over; it exceeds M where items
    that contribute nothing were left out, so that leaving them out changes no gradient. ``metrics`` are the batch's.
    """

    sample: Tensor
    tensors: Mapping[str, Tensor]
    total: int
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sample)

    def take(self, index: Tensor) -> Credit:
        """Return a selection of the items; its ``total`` is its own length."""
        return Credit(self.sample[index], {k: v[index] for k, v in self.tensors.items()}, int(index.numel()))


@dataclass(frozen=True)
class TrainBatch:
    """M items as a loss sees them: tensors with leading dimension M, a condition of M samples, shared constants."""

    tensors: Mapping[str, Tensor]
    condition: Condition
    shared: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.condition)

    def take(self, index: Tensor) -> TrainBatch:
        """Return a selection of the items."""
        return TrainBatch({k: v[index] for k, v in self.tensors.items()}, self.condition.take(index), self.shared)


@dataclass(frozen=True)
class Mean:
    """A metric that is averaged over the items that were there; a bare tensor is averaged over ``total``, as a loss."""

    value: Tensor


@dataclass(frozen=True)
class Max:
    """A metric whose largest value counts, over micro-batches and ranks; of several updates the first one's."""

    value: Tensor


Metric = Tensor | Mean | Max


def value_of(metric: Metric) -> Tensor:
    """Give the number of a metric, however it is put together with others."""
    return metric.value if isinstance(metric, Mean | Max) else metric


@dataclass(frozen=True)
class Update:
    """The learner's answer to one batch: the new policy version and its metrics."""

    version: int
    metrics: Mapping[str, float]
