"""The contract of an algorithm: what it consumes, how trajectories are made, how credit becomes a loss.

An algorithm is one file under ``flowalign/algorithms``, or the user's own. Loop, learner, checks, plan and card read
its declaration, `Needs`, and know no algorithm by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, field_validator
from torch import Tensor

from flowalign.config.booleans import refuse_boolean
from flowalign.config.largest import check_largest
from flowalign.config.teachers import TeacherConfig
from flowalign.config.walk import Grid
from flowalign.flow.guidance import guidance_of
from flowalign.flow.schedule import PipelineSchedule
from flowalign.types import (
    Condition,
    Credit,
    EncodedPrompts,
    Guidance,
    LatentBatch,
    Metric,
    PreferencePairs,
    PromptBatch,
    SamplingPlan,
    Scores,
    TrainBatch,
    Trajectories,
)


class VelocityModel(Protocol):
    """A network as a function: ``velocity(x_t, t, condition)`` with x (N, C, H, W) and t (N,) in [0, 1].

    Where an algorithm needs a ``signed_time`` t may be negative, down to -1.
    """

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        r: Tensor | None = None,
        guidance: Guidance | None = None,
    ) -> Tensor: ...


Models = Mapping[str, VelocityModel]
Features = Callable[[Tensor], Sequence[Tensor]]  # latents (N, C, H, W) to maps (N, C', ...), with gradient
Decoder = Callable[[Tensor], Tensor]  # latents (N, C, H, W) to pixels (N, 3, H, W) in [0, 1], with gradient
Reward = Callable[[Tensor, PromptBatch], Tensor]  # such pixels, and whose they are, to totals (N,), with gradient


@dataclass(frozen=True)
class LossOutput:
    """A scalar loss, the mean over a minibatch's items, and detached metrics.

    A metric that is a tensor is a mean and is put together as the loss is; `Mean` and `Max` say otherwise.
    """

    loss: Tensor
    metrics: Mapping[str, Metric] = field(default_factory=dict)


class AlgorithmConfig(BaseModel):
    """Base of the nested ``Config`` of every algorithm; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    type: str
    _no_boolean = field_validator("*", mode="before")(refuse_boolean)
    _within_limits = field_validator("*")(check_largest)


class Source(Protocol):
    """What a learner's rank learns from: batches by iteration, the same on every rank."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Numbers on all there is to learn from, for every row of the metrics."""
        ...

    def meet(self) -> None:
        """Prepare what the ranks prepare together, once, after they have met; a collective call."""
        ...

    def batch(self, iteration: int) -> Any:
        """Return the batch of an iteration, counted from 0: a function of it and of the run's seed."""
        ...


Batch = type[Trajectories] | type[PreferencePairs] | type[LatentBatch] | type[EncodedPrompts]


@dataclass(frozen=True)
class Reference:
    """The frozen policy that the run began as; every ``refresh`` iterations it takes the policy's weights."""

    refresh: int | None = None


@dataclass(frozen=True)
class Second:
    """A second network that is trained: it begins as the policy does, and has an optimizer of its own.

    For each update of the policy it makes ``updates``, before it and each on its own share of the same items, or fewer
    where there are fewer items. Its learning rate is constant; None is the one that the policy's begins with.
    """

    updates: int = 1
    learning_rate: float | None = None


@dataclass(frozen=True)
class Needs:
    """An algorithm's demands on a run; loop, learner, checks and plan read these and nothing else.

    ``batch`` is what the run gives it to learn from. That of `EncodedPrompts` walks inside the learner.

    Beside the policy ``loss`` and ``annotate`` may call the networks that are declared here, by their roles:
    ``reference``; ``teacher:<name>`` for each of ``teachers``, of which ``teacher_of`` names that of a sample by its
    metadata; of training on latents a frozen ``teacher`` and ``ema``, the learner's average. ``rollout`` is the network
    with the weights that made the batch, the policy's or their average as ``rollout_weights`` says: it is there in
    ``annotate`` only, in the place of ``policy``. ``features`` are a map from latents to maps, as `Features`.
    ``decoder`` is the model's own, as `Decoder`, and ``reward`` the run's ``rewards``, each of which can be
    differentiated, as `Reward`. Through these three a gradient flows; they are there in ``loss`` only.

    ``second`` is a network that is trained beside the policy, by `Algorithm.second_loss`, in an alignment. In ``loss``
    it gives no gradients, and in ``second_loss`` the policy gives none. With
    ``whole_groups`` an item is a group: its tensors have ``group_size`` rows where those of others have one, its
    condition is one, and shuffling and sharing keep it together. ``signed_time`` asks for velocities at t in [-1, 1].

    ``inputs`` are those that its network must have beside the time, ``path_family`` the path that it is trained on. A
    loss that names no guidance asks a network that takes the scale as an input at ``guidance_scale``.
    """

    batch: Batch
    scores: bool = False
    group_size: int = 1
    rollout_weights: Literal["model", "ema"] = "model"
    reference: Reference | None = None
    rollout: bool = False
    second: Second | None = None
    whole_groups: bool = False
    signed_time: bool = False
    teachers: Mapping[str, TeacherConfig] = field(default_factory=dict)
    teacher_of: Callable[[Mapping[str, Any]], str] | None = None
    teacher: bool = False
    average: bool = False
    features: bool = False
    decoder: bool = False
    reward: bool = False
    inputs: tuple[str, ...] = ()
    path_family: str = "rf"
    guidance_scale: float = 1.0

    @property
    def trained(self) -> int:
        """Networks that learn."""
        return 1 if self.second is None else 2

    @property
    def item_samples(self) -> int:
        """Samples of one item."""
        return self.group_size if self.whole_groups else 1

    def whole(self, micro_batch_size: int) -> int:
        """Return the size of a micro-batch of at most ``micro_batch_size`` samples: whole items, at least one."""
        return max(1, micro_batch_size // self.item_samples) * self.item_samples

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the networks, the policy first."""
        asked = {"rollout": self.rollout, "reference": self.reference, "second": self.second}
        asked |= {"teacher": self.teacher, "ema": self.average}
        return ("policy", *(role for role, wanted in asked.items() if wanted), *map(teacher_role, self.teachers))


def teacher_role(name: str) -> str:
    """Give the role of the teacher ``name``."""
    return f"teacher:{name}"


@dataclass(frozen=True)
class Call:
    """The velocities that the network ``role`` is asked for about one sample of an item, guided by ``guidance``.

    They are ``times``, in the mean where items differ. With ``learns`` they have a gradient: what they are made of is
    kept for it, of all of them at a time. With ``derivative`` each comes with its change along a direction (forward
    mode), which costs a pass more.
    """

    role: str
    times: float = 1.0
    guidance: Guidance | None = None
    learns: bool = False
    derivative: bool = False


@dataclass(frozen=True)
class Calls:
    """What each part of an update asks: `Algorithm.annotate` once an iteration, the losses in every epoch.

    Each of several teachers has the samples of its own tasks, so that one of them is asked about a sample.
    """

    annotate: tuple[Call, ...] = ()
    loss: tuple[Call, ...] = (Call("policy", learns=True),)
    second_loss: tuple[Call, ...] = ()


def _class_of(kind: type, name: str) -> type:
    """Return the class of which ``kind`` has an attribute."""
    return next(own for own in kind.__mro__ if name in vars(own))


class Algorithm:
    """Base of all algorithms: what a batch's items are worth, what networks say of them once, what they teach.

    Every rank of a learner knows the `credit` of a batch. The items are shuffled, then shared among the ranks, and each
    rank has its own annotated, once, before the first update; `items` is called anew for every micro-batch.
    """

    Config: ClassVar[type[AlgorithmConfig]]
    config: Any  # one of its own Config
    schedule: PipelineSchedule = PipelineSchedule()  # the model's own, as `build_algorithm` is given it

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def needs(self) -> Needs:
        """Return the algorithm's demands on a run."""
        raise NotImplementedError

    def plan(self, iteration: int, seed: int) -> SamplingPlan | None:
        """Plan how iteration ``iteration`` of a run with ``seed`` makes its trajectories; None: it makes none."""
        return None

    def source(self, given: Source) -> Source:
        """Return what it learns from: the run's own source of ``needs.batch``, or one of its own that draws on that.

        A batch is the same on every rank, so that a source asks no network; a walk of the policy is for `annotate`.
        """
        return given

    @property
    def network_calls(self) -> Calls:
        """Say how often the networks are asked about an item: a plan counts by it, and the learner obeys it.

        `annotate` and the losses are given the networks that are named for them here, and no others. By default they
        are given all that ``needs`` declares, and each is counted once, guided as the rollout is.
        """
        plan, needs = self.plan(0, 0), self.needs
        guidance = None if plan is None else plan.guidance
        beside = [role for role in needs.roles if role not in ("policy", "rollout") and not role.startswith("teacher:")]
        annotate = [Call("rollout", guidance=guidance)] if needs.rollout else []
        annotate += [Call(teacher_role(name), guidance=guidance_of(own)) for name, own in needs.teachers.items()]
        loss = [Call("policy", guidance=guidance, learns=True), *(Call(role, guidance=guidance) for role in beside)]
        second = (Call("second", guidance=guidance, learns=True),) * (needs.second is not None)
        return Calls(tuple(annotate), tuple(loss), second)

    @property
    def says_calls(self) -> bool:
        """Whether ``network_calls`` are said of its own `annotate` and losses: by their class, or by one below it."""
        by = _class_of(type(self), "network_calls")
        asking = (_class_of(type(self), part) for part in ("annotate", "loss", "second_loss"))
        return by is not Algorithm and all(issubclass(by, own) for own in asking)

    def most_items(self, samples: int) -> int:
        """Return how many items ``samples`` of a batch become at the most; of whole groups, how many samples of items.

        By default they are a sample's steps with noise, or itself where its walk has none.
        """
        plan = self.plan(0, 0)
        return samples * max(1, 0 if plan is None else plan.noise.num_steps)

    def credit(self, batch: Any, scores: Scores | None) -> Credit:
        """Say which items a batch is learned from, and what each is worth. It asks no network and is cheap.

        There are at most as many as `most_items` says.
        """
        raise NotImplementedError

    def items(self, batch: Any, credit: Credit) -> TrainBatch:
        """Take the items of ``credit``, all or a selection of them, from their batch. By default they are its tensors.

        An item is the same in every selection.
        """
        return TrainBatch(credit.tensors, batch.condition.take(credit.sample))

    def annotate(self, models: Models, batch: Any, credit: Credit) -> Mapping[str, Tensor]:
        """Ask networks about the items of ``credit``, those of one rank: tensors with leading dimension M.

        ``loss`` finds them beside those of `items`, in the place of such as have the same name. It runs without
        gradients; the models take CPU tensors of any number of samples. What is said of an item may not depend on
        the others. Call the network ``rollout`` as often on every rank, whatever the items are.
        """
        return {}

    def loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        """Give the mean over the items of ``minibatch``; a pure function of them and the networks."""
        raise NotImplementedError

    def second_loss(self, models: Models, minibatch: TrainBatch) -> LossOutput:
        """Give the loss that the network ``second`` learns by, as `loss` does for the policy."""
        raise NotImplementedError

    def check_schedule(self) -> None:
        """Raise ValueError, its key first, where it has no levels on the model's own schedule.

        One that is no `Scheduled` makes its own, and must not take them for the model's where its ``shift`` is null.
        """
        if getattr(self.config, "shift", 0) is None and not self.schedule.is_static:
            raise ValueError(
                "shift: is null, and this algorithm makes levels of its own, which are not those of the model's "
                f"pipeline ({self.schedule.converts or 'use_dynamic_shifting'}); give a number, or let it inherit "
                "flowalign.algorithm.Scheduled"
            )

    def replaced_levels(self) -> str | None:
        """Say whose shift its own takes the place of, in one line; None: nobody's."""
        return None

    def card_facts(self) -> dict[str, str]:
        """Say what who uses the trained model must know: rows of its card by title."""
        return {}


def prepared(algorithm: Algorithm, batch: Any, scores: Scores | None, models: Models) -> tuple[Credit, TrainBatch]:
    """Return the credit of a batch and all its items, annotated: what one rank alone would learn from."""
    credit = algorithm.credit(batch, scores)
    return credit, annotated(algorithm.items(batch, credit), algorithm.annotate(models, batch, credit))


def annotated(items: TrainBatch, said: Mapping[str, Tensor]) -> TrainBatch:
    """Return ``items`` with what `Algorithm.annotate` says of them."""
    return replace(items, tensors={**items.tensors, **said})


class Scheduled(Algorithm):
    """Base of the algorithms whose configuration has ``num_steps``, ``shift`` and ``grid``: its walk's levels."""

    _made: tuple[PipelineSchedule, Tensor] | None = None

    def levels(self) -> Tensor:
        """Return the noise levels, float32 (num_steps + 1,).

        Raise ValueError where the model's pipeline has none such.
        """
        if self._made is None or self._made[0] is not self.schedule:
            c = self.config
            grid: Grid = getattr(c, "grid", "pipeline")
            self._made = self.schedule, self.schedule.levels(c.num_steps, c.shift, grid)
        return self._made[1]

    def check_schedule(self) -> None:
        self.levels()

    def replaced_levels(self) -> str | None:
        return self.schedule.replacement(self.config.shift)
