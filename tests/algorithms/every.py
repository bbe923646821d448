"""Every algorithm found under flowalign/algorithms, with its defaults."""

from __future__ import annotations

from typing import Any

from flowalign.algorithm import Algorithm
from flowalign.algorithms import build_algorithm, known_algorithms
from flowalign.types import SamplingPlan

REQUIRED = {"opd": {"teachers": {"better": {"path": "shapes"}}}}  # options without a default
DEFAULTS: dict[str, dict[str, Any]] = {name: {"type": name, **REQUIRED.get(name, {})} for name in known_algorithms()}


def every_algorithm() -> dict[str, Algorithm]:
    return {name: build_algorithm(config) for name, config in DEFAULTS.items()}


def plan_of(algorithm: Algorithm, iteration: int = 0, seed: int = 0) -> SamplingPlan:
    """The plan of an algorithm that rolls out."""
    plan = algorithm.plan(iteration, seed)
    assert plan is not None
    return plan
