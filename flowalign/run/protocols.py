"""What a run is made of, as the loop sees it: where the work is done, what draws samples, what is left behind."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from flowalign.algorithm import Algorithm
from flowalign.types import Preview, PromptBatch, SamplingPlan, Scores, Update

Count = Callable[[int, int], None]  # (finished chunks, their number)


@dataclass(frozen=True)
class Collected:
    """Samples of one iteration with their scores, as the driver knows them.

    ``batch`` has a row an image. ``trajectories`` are for `Backend.update` alone, which knows what they are: chunks, or
    where they lie; those of two collections are joined as lists are. Seconds of work are means over the workers of a
    kind.
    """

    batch: PromptBatch
    scores: Scores
    preview: Preview
    trajectories: Sequence[Any]
    rollout_s: float
    score_s: float


NOTHING = Collected(
    batch=PromptBatch((), (), (), ()),
    scores=Scores({}, torch.zeros(0), torch.zeros(0, dtype=torch.bool)),
    preview=Preview(np.zeros((0, 1, 1, 3), np.uint8), {}),
    trajectories=(),
    rollout_s=0.0,
    score_s=0.0,
)


class Backend(Protocol):
    """The place of the work: this process or Ray actors. Both compute the same bits."""

    def collect(
        self, batch: PromptBatch, plan: SamplingPlan, *, seed: int, evaluation: bool = False, count: Count | None = None
    ) -> Collected: ...  # `NOTHING` in those processes of a run that make nothing

    # `trajectories` are those of a `Collected`; None: from what the learner has on disk.
    def update(self, trajectories: Sequence[Any] | None, scores: Scores | None, iteration: int) -> Update: ...

    # Every rollout worker acknowledges the weights, or the run stops; for evaluation those of `evaluation.weights`.
    def sync(self, evaluation: bool = False) -> None: ...

    # The losses on what is kept for that, where there is something.
    def validate(self) -> dict[str, float]: ...

    def parameters(self) -> tuple[int, int]: ...  # trained, and all

    def state(self) -> list[dict[str, Any]]: ...  # one entry a rank of the learner

    def restore(self, states: list[dict[str, Any]]) -> str | None: ...  # a line where the ranks shared it otherwise

    def restart_learner(self) -> None: ...  # after `RankLost`; `restore` and `sync` follow

    def close(self) -> None: ...


class Sampler(Protocol):
    """The samples of each iteration: a function of seed, iteration, and the scores of those before."""

    def batch(self, iteration: int) -> PromptBatch: ...

    # One more group for each of these tasks, whose prompts are none of those drawn already.
    def refill(self, iteration: int, draw: int, tasks: Sequence[str], drawn: Collection[str]) -> PromptBatch: ...

    # Takes over what an iteration scored, and returns metrics, where later ones depend on it.
    def learn(self, batch: PromptBatch, scores: Scores) -> dict[str, float]: ...

    def state(self) -> dict[str, Any]: ...  # plain data for a checkpoint, empty where nothing was learned

    def restore(self, state: Mapping[str, Any]) -> None: ...  # an empty one is the beginning of the run


class Journal(Protocol):
    """The traces of a run: metrics, images, checkpoints, and what it says meanwhile."""

    # `begun` is the iteration of something that may be long and is said where no bar shows it.
    def doing(self, what: str, begun: int | None = None) -> Count: ...

    def begin(self) -> None: ...  # before the first iteration; from here on there is something to keep

    def iteration(self, iteration: int, metrics: dict[str, float], collected: Collected | None) -> None: ...

    def evaluation(self, iteration: int, collected: Collected, seconds: float) -> dict[str, float]: ...

    # `drawn` is the sampler's state.
    def checkpoint(
        self, iteration: int, backend: Backend, metrics: dict[str, float], drawn: Mapping[str, Any]
    ) -> None: ...

    def due(self, what: str, iteration: int) -> bool: ...

    @property
    def stopping(self) -> bool: ...  # somebody or something asked the run to end after this iteration


@dataclass(frozen=True)
class Run:
    """The fixed parts of a run.

    ``sized`` has the algorithm on the schedule of each image size, (height, width), other than the model's own.
    """

    algorithm: Algorithm
    sampler: Sampler
    evaluation: tuple[PromptBatch, SamplingPlan, int] | None
    iterations: int
    seed: int
    min_valid_fraction: float
    sized: tuple[tuple[tuple[int, int], Algorithm], ...] = ()
    evaluates_ema: bool = False
    refill: int = 0  # draws of an iteration beside its first, at most

    def plan(self, iteration: int) -> SamplingPlan | None:
        """Return how the samples of an iteration are made, at each size; None: there are none."""
        plan = self.algorithm.plan(iteration, self.seed)
        if plan is None or not self.sized:
            return plan
        own = ((size, algorithm.plan(iteration, self.seed)) for size, algorithm in self.sized)
        return replace(plan, by_size=tuple((size, made.sigmas) for size, made in own if made is not None))
