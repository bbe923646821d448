"""What a plan says of an iteration's passes, beside the rows that a real iteration calls its networks with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from flowalign.algorithms import build_algorithm
from flowalign.config.run import RunConfig
from flowalign.config.sections import ModelConfig
from flowalign.config.training import PretrainConfig
from flowalign.making.shapes_latents import make_bank
from flowalign.models.build import load_encoders
from flowalign.models.inspect import own_schedule
from flowalign.plan import plan_geometry
from flowalign.plan.geometry import Geometry
from flowalign.run.collecting import Request
from flowalign.run.fixed import build_run
from flowalign.run.workers import LearnerWorker, RolloutWorker
from tests.algorithms.toy import make_scores
from tests.tiny import encoded_here, run_config

GUIDED = {"guidance_scale": 3, "num_steps": 4}
ALIGNED: dict[str, dict[str, Any]] = {
    "flow_grpo": {"type": "flow_grpo", **GUIDED, "beta": 0.1},
    "flow_grpo, another guidance, some steps of the best and the worst": {
        "type": "flow_grpo",
        **GUIDED,
        "update_guidance_scale": 1,
        "keep": {"best": 1, "worst": 1},
        "train_steps": 2,
    },
    "flow_grpo, branches": {
        "type": "flow_grpo",
        "num_steps": 6,
        "window": {"kind": "fixed", "start": 2, "size": 1},
        "initial_noise": "group",
        "share_prefix": True,
        "granularities": [1, 2],
    },
    "awm": {"type": "awm", **GUIDED, "timesteps": 3, "beta": 0.1},
    "nft": {"type": "nft", **GUIDED, "solver": "heun", "timesteps": 2, "kl_beta": 0.1},
    "sft": {"type": "sft", **GUIDED, "timesteps": 3},
    "diffusion_dpo": {"type": "diffusion_dpo", **GUIDED, "timesteps": 2},
    "opd": {"type": "opd", **GUIDED},
}
OF_LATENTS: dict[str, dict[str, Any]] = {
    "rectified_flow": {},
    "reflow": {},
    "progressive": {"guidance_scale": 2},
    "guidance_distill": {"guidance_scale": 2},
    "consistency": {"solver": "heun", "guidance_scale": 2},
    "meanflow": {"equal_fraction": 0, "omega": 0.5, "kappa": 0.3},
}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Rows of all calls of networks inside, those with a gradient apart."""
    rows: Counter[str] = Counter()

    def count(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, SD3Transformer2DModel):
            rows["learned" if output[0].requires_grad else "asked"] += len(output[0])

    hook = register_module_forward_hook(count)
    try:
        yield rows
    finally:
        hook.remove()


def planned(config: RunConfig) -> Geometry:
    return plan_geometry(config, build_algorithm(config.algorithm, own_schedule(config.model)))


@pytest.mark.parametrize("name", ALIGNED)
def test_an_alignment_makes_the_passes_that_are_planned(tiny_pipeline_dir: Path, name: str) -> None:
    own, more = {"group_size": 4, **ALIGNED[name]}, {}
    if name == "opd":
        own |= {"teachers": {"better": {"path": str(tiny_pipeline_dir), "guidance_scale": 2}}}
        more["rewards"] = []
    learner = {"engine": "torch", "micro_batch_size": 5, "updates_per_iteration": 2, "epochs": 2}
    learner |= {"ema_decay": 0.9, "optimizer": {"learning_rate": 1e-3}}
    data, rollout = {"groups_per_iteration": 2}, {"chunk_size": 8}
    config = run_config(tiny_pipeline_dir, algorithm=own, learner=learner, data=data, rollout=rollout, **more)
    plan, run, geometry = build_algorithm(own).plan(0, 0), build_run(config), planned(config)
    assert plan is not None
    student, worker = RolloutWorker(config), LearnerWorker(config)
    try:
        student.bind(worker.weights(), worker.version())
        with counted() as walked:
            _, made, _ = student.rollout(Request(run.sampler.batch(0), plan, 0, 0))
        assert geometry.decoded == len(made.final_NCHW)
        scores = None if name == "opd" else make_scores(torch.arange(float(geometry.decoded)))
        with counted() as updated:
            metrics = worker.update([made], scores, 0).metrics
    finally:
        worker.close()
    assert metrics["learner/transitions"] == geometry.transitions
    assert walked == {"asked": geometry.rollout_passes}
    assert updated["learned"] == geometry.learner_backward_passes
    asked = geometry.learner_forward_passes - geometry.learner_backward_passes + geometry.teacher_passes
    assert updated["asked"] == asked


@pytest.fixture(scope="module")
def bank(tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bank")
    make_bank(load_encoders(ModelConfig(path=str(tiny_pipeline_dir))), directory, num_images=20, batch=20)
    return directory


@pytest.mark.parametrize("name", OF_LATENTS)
def test_a_training_on_latents_makes_the_passes_that_are_planned(
    tiny_pipeline_dir: Path, bank: Path, name: str, tmp_path: Path
) -> None:
    inputs = ["r"] if name == "meanflow" else []
    model = {"path": str(tiny_pipeline_dir), "max_sequence_length": 16, "inputs": inputs}
    taught = name in ("progressive", "guidance_distill", "consistency")
    config = PretrainConfig.model_validate(
        {
            "name": "base",
            "runs_dir": str(tmp_path),
            "model": model,
            "latents": str(bank),
            "teacher": {"path": str(tiny_pipeline_dir), "max_sequence_length": 16} if taught else None,
            "algorithm": {"type": name, **OF_LATENTS[name]},
            "phases": [{"iterations": 1, "learning_rate": 1e-3}],
            "learner": {"batch_size": 10, "micro_batch_size": 4},
            "cluster": {"threads": 1},
        }
    )
    geometry, worker = planned(config), LearnerWorker(encoded_here(config))
    try:
        with counted() as updated:
            worker.update((), None, 0)
    finally:
        worker.close()
    assert updated["learned"] == geometry.learner_backward_passes == 10
    asked = geometry.learner_forward_passes - geometry.learner_backward_passes + geometry.teacher_passes
    assert updated["asked"] == asked
    assert geometry.derivative_passes == (10 if name == "meanflow" else 0)
