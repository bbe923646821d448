"""The reference of Flow-GRPO's KL that follows the policy, in a real learner on real rollouts of a tiny pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from flowalign.algorithm import Reference
from flowalign.algorithms import build_algorithm
from flowalign.config.alignment import AlignConfig
from flowalign.run.collecting import Request
from flowalign.run.fixed import build_run
from flowalign.run.workers import LearnerWorker, RolloutWorker
from flowalign.types import Scores
from tests.algorithms.every import plan_of

LORA = {"rank": 4, "alpha": 8}


def grpo_config(pipeline: Path, lora: Any, **algorithm: Any) -> AlignConfig:
    options = {"group_size": 4, "num_steps": 3, "clip_range": 0.1, "beta": 0.1, "reference_refresh": 2, **algorithm}
    content = {
        "name": "refreshed",
        "iterations": 4,
        "model": {"path": str(pipeline), "max_sequence_length": 16, "lora": lora},
        "data": {"groups_per_iteration": 2},
        "algorithm": {"type": "flow_grpo", **options},
        "rewards": [{"spec": "geneval", "options": {"mode": "partial"}}],
        "rollout": {"chunk_size": 8},
        "learner": {"engine": "torch", "micro_batch_size": 8, "optimizer": {"learning_rate": 1e-3}},
        "cluster": {"backend": "local", "threads": 1},
        "evaluation": {"every": 0},
    }
    return AlignConfig.model_validate(content)


def update(config: AlignConfig, student: RolloutWorker, learner: LearnerWorker, iteration: int) -> Mapping[str, float]:
    """One iteration, with the brightness of a pixel as its reward."""
    student.bind(learner.weights(), learner.version())
    plan = plan_of(build_algorithm(config.algorithm), iteration)
    batch = build_run(config).sampler.batch(iteration)
    _, rollout, _ = student.rollout(Request(batch, plan, 0, learner.version()))
    total = rollout.final_NCHW[:].mean((1, 2, 3))
    return learner.update([rollout], Scores({"x": total}, total, torch.ones(8, dtype=torch.bool)), iteration).metrics


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_kl_is_measured_from_the_policy_of_the_last_refresh(lora: Any, tiny_pipeline_dir: Path) -> None:
    config = grpo_config(tiny_pipeline_dir, lora)
    student, learner = RolloutWorker(config), LearnerWorker(config)
    kl = [update(config, student, learner, iteration)["loss/kl"] for iteration in range(4)]
    learner.close()
    assert [value == 0 for value in kl] == [True, False, True, False]


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_learner_goes_on_bitwise_with_the_reference_it_had(lora: Any, tiny_pipeline_dir: Path) -> None:
    config = grpo_config(tiny_pipeline_dir, lora)
    student, learner, other = RolloutWorker(config), LearnerWorker(config), LearnerWorker(config)
    for iteration in range(3):
        update(config, student, learner, iteration)
    other.restore(**learner.state())
    metrics = [update(config, student, worker, 3) for worker in (learner, other)]
    states = [worker.state() for worker in (learner, other)]
    for worker in (learner, other):
        worker.close()
    assert metrics[0] == metrics[1] and metrics[0]["loss/kl"] > 0
    for a, b in ((s["model"], t["model"]) for s, t in [states]):
        assert all(torch.equal(a[name], b[name]) for name in a)
    tensors = [state["optimizer"][0] for state in states]
    assert tensors[0].keys() == tensors[1].keys() and any(name.startswith("reference.") for name in tensors[0])
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_without_a_refresh_the_reference_stays_the_start(tiny_pipeline_dir: Path) -> None:
    config = grpo_config(tiny_pipeline_dir, None, reference_refresh=None)
    student, learner = RolloutWorker(config), LearnerWorker(config)
    kl = [update(config, student, learner, iteration)["loss/kl"] for iteration in range(3)]
    state = learner.state()
    learner.close()
    assert kl[0] == 0 and 0 < kl[1] and 0 < kl[2]
    assert not any(name.startswith("reference.") for name in state["optimizer"][0])


def test_a_refresh_without_a_kl_is_refused() -> None:
    with pytest.raises(ValidationError, match="reference_refresh: without a KL there is no reference; set beta"):
        build_algorithm({"type": "flow_grpo", "reference_refresh": 10})
    refreshed = build_algorithm({"type": "flow_grpo", "beta": 0.1, "reference_refresh": 10})
    assert refreshed.needs.reference == Reference(refresh=10)
    assert build_algorithm({"type": "flow_grpo", "beta": 0.1}).needs.reference == Reference()
