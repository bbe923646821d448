"""A learner as tests make it: by single options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowalign.algorithm import Algorithm, VelocityModel
from flowalign.config.run import Passes
from flowalign.engine.average import Averages
from flowalign.engine.base import Engine
from flowalign.run.learner import Learner


def make_learner(
    algorithm: Algorithm,
    models: Mapping[str, VelocityModel],
    engine: Engine,
    *,
    micro_batch_size: int = 8,
    updates_per_iteration: int = 1,
    epochs: int = 1,
    ema_decay: float | None = None,
    **more: Any,
) -> Learner:
    passes = Passes(micro_batch_size, updates_per_iteration, epochs)
    ema = None if ema_decay is None else Averages(engine, [ema_decay])
    return Learner(algorithm, models, engine, passes=passes, ema=ema, **more)
