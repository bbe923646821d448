"""A toy's learner that trains a second network, on one rank or several."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowalign.config.sections import OptimizerConfig
from flowalign.engine import Engine, EngineSettings, build_engine
from flowalign.run.learner import Learner
from tests.algorithms.every import plan_of
from tests.algorithms.seams.second_network import DistributionMatching
from tests.algorithms.toy import LinearVelocity, make_rollout


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
    own = Learner(
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


def both(own: Learner) -> dict[str, Tensor]:
    """Weights of policy and second network."""
    assert own.second is not None
    return {**own.weights(), **{f"second {name}": tensor for name, tensor in own.second.weights().items()}}
