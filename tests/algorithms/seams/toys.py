"""A toy's learner that trains a second network, on one rank or several."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowalign.config.sections import OptimizerConfig
from flowalign.engine import Engine, EngineSettings, build_engine
from flowalign.run.learner import Learner
from flowalign.types import Update
from tests.algorithms.every import plan_of
from tests.algorithms.seams.second_network import DistributionMatching
from tests.algorithms.seams.whole_groups import Listwise
from tests.algorithms.toy import LinearVelocity, make_rollout, make_scores
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


def both(own: Learner) -> dict[str, Tensor]:
    """Weights of policy and second network."""
    assert own.second is not None
    return {**own.weights(), **{f"second {name}": tensor for name, tensor in own.second.weights().items()}}
