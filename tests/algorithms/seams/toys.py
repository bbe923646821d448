"""Toy learners of the test algorithms here, on one rank or several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowalign.config.updates import OptimizerConfig
from flowalign.engine.base import Engine, EngineSettings
from flowalign.engine.build import build_engine
from flowalign.run.learner import Learner
from flowalign.types import EncodedPrompts, PromptBatch, Update
from tests.algorithms.every import plan_of
from tests.algorithms.seams.direct_reward import DirectReward
from tests.algorithms.seams.second_network import DistributionMatching
from tests.algorithms.seams.warm import Warm
from tests.algorithms.seams.whole_groups import Listwise
from tests.algorithms.toy import SHAPE, LinearVelocity, condition, make_rollout, make_scores
from tests.learners import make_learner

REWARDS = torch.tensor([0.0, 1.0, 0.5, 0.2, 1.0, 0.0, 0.0, 1.0])


def engine(model: LinearVelocity, rate: float = 1e-2, **place: Any) -> Engine:
    return build_engine(
        model,
        EngineSettings(
            type="fsdp" if place else "torch", optimizer=OptimizerConfig().model_copy(update={"learning_rate": rate})
        ),
        **place,
    )


def matching(**changes: Any) -> DistributionMatching:
    options = {"group_size": 4, "num_steps": 3, "timesteps": 3, **changes}
    return DistributionMatching(DistributionMatching.Config.model_validate(options))


def learned(policy_rate: float = 1e-2, updates: int = 3, **place: Any) -> Learner:
    """The learner after two iterations of two updates each; ``place``: which rank of how many, as `build_engine`."""
    policy, second, start = LinearVelocity(0), LinearVelocity(1), LinearVelocity(2)
    own = make_learner(
        matching(second_updates=updates),
        {"policy": policy, "second": second, "reference": start},
        engine(policy, policy_rate, **place),
        micro_batch_size=4,
        updates_per_iteration=2,
        second=engine(second, **place),
    )
    for iteration in range(2):
        own.update(make_rollout(LinearVelocity(0), plan_of(own.algorithm)), None, iteration)
    return own


def listwise(micro_batch_size: int, **place: Any) -> tuple[Learner, Update]:
    """A learner of six whole groups after one update of them."""
    policy = LinearVelocity()
    algorithm = Listwise(Listwise.Config.model_validate({"group_size": 4, "num_steps": 3}))
    own = make_learner(algorithm, {"policy": policy}, engine(policy, **place), micro_batch_size=micro_batch_size)
    rollout = make_rollout(LinearVelocity(), plan_of(algorithm), groups=6)
    return own, own.update(rollout, make_scores(REWARDS.repeat(3)), 0)


class Given:
    """The run's prompts, as a rank's learner is given them: here ten samples of one."""

    metrics: Mapping[str, float] = {}

    def meet(self) -> None: ...

    def batch(self, iteration: int) -> EncodedPrompts:
        ids = tuple(range(10 * iteration, 10 * iteration + 10))
        return EncodedPrompts(PromptBatch(("p",) * 10, ids, ids, ({},) * 10), condition(10), SHAPE, 0)


def decoder(latents: Tensor) -> Tensor:
    """Pixels (N, 3, 3, 3) of latents of ``SHAPE``."""
    mixing = torch.randn(3, SHAPE[0], generator=torch.Generator().manual_seed(0))
    return torch.einsum("dc,nchw->ndhw", mixing, latents).sigmoid()


def warmth(pixels: Tensor, batch: PromptBatch) -> Tensor:
    return Warm.of(pixels)


def directed(updates: int = 1, **place: Any) -> tuple[Learner, list[Update]]:
    """A learner that walks by itself, after ``updates`` of one micro-batch more than a rank has."""
    algorithm = DirectReward(DirectReward.Config.model_validate({}))
    source, models = algorithm.source(Given()), {"policy": LinearVelocity(), "decoder": decoder, "reward": warmth}
    own = make_learner(algorithm, models, engine(models["policy"], **place), micro_batch_size=4)
    return own, [own.update(source.batch(iteration), None, iteration) for iteration in range(updates)]


def both(own: Learner) -> dict[str, Tensor]:
    """Weights of policy and second network."""
    assert own.second is not None
    return {**own.weights(), **{f"second {name}": tensor for name, tensor in own.second.weights().items()}}
