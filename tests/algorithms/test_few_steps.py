"""Every few-step algorithm, on the mixture of the plane: its samples of few steps beat the base's of as many."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.types import Guidance, LatentBatch
from tests.algorithms.every import every_algorithm
from tests.algorithms.few_steps import (
    Student,
    average_steps,
    consistency_steps,
    data,
    distance,
    exact,
    generate,
    start_noise,
    train,
)

Sampler = Callable[[Any, int, Tensor], Tensor]
CONSISTENCY = {"type": "consistency", "num_steps": 25, "skip": 1, "loss": "squared"}


@cache
def base(num_steps: int) -> float:
    return distance(generate(exact, num_steps, start_noise()))


def improves(student: Student, sampler: Sampler = generate, steps: tuple[int, ...] = (1, 2, 4)) -> dict[int, float]:
    """How far the student's samples are from the data, as a share of the base's, by number of steps."""
    return {k: distance(sampler(student, k, start_noise())) / base(k) for k in steps}


def test_the_distance_tells_data_from_the_bases_few_steps():
    assert distance(data(1000, torch.Generator().manual_seed(1))) < 5e-3 < base(20) < 0.02 < base(4) < base(2) < base(1)


def test_reflow_on_the_bases_own_pairs():
    noise = torch.randn(4000, 2, 1, 1, generator=torch.Generator().manual_seed(3))
    student = train({"type": "reflow"}, steps=300, pairs=(noise, generate(exact, 50, noise)))
    assert max(improves(student).values()) < 0.6


@pytest.mark.parametrize("more", [{}, {"solver": "heun"}, {"teacher": "none"}], ids=["euler", "heun", "training"])
def test_consistency(more):
    student = train({**CONSISTENCY, **more}, steps=300)
    assert max(improves(student, consistency_steps).values()) < 0.6


def test_meanflow_without_a_teacher():
    student = train({"type": "meanflow", "adaptive_power": 0, "condition_dropout": 0}, steps=300)
    assert max(improves(student, average_steps).values()) < 0.9


def test_progressive_rounds_halve_the_steps():
    teacher, student = exact, None
    for steps in (4, 2, 1):
        student = train({"type": "progressive", "num_steps": steps}, steps=250, teacher=teacher, start=student)
        assert improves(student, steps=(steps,))[steps] < 0.7
        teacher = student


@pytest.mark.parametrize(
    ("config", "told"), [({"guidance_scale": 3}, None), ({"guidance_range": [1, 5]}, Guidance(4.0))]
)
def test_guidance_distillation_makes_the_guided_teachers_samples_in_one_call_a_step(config, told):
    student = train({"type": "guidance_distill", **config}, steps=300, mode=0)
    for steps in (4, 20):
        guided = generate(exact, steps, start_noise(), mode=0, guidance=told or Guidance(3.0))
        unguided = generate(exact, steps, start_noise(), mode=0)
        own = generate(student, steps, start_noise(), mode=0, guidance=told)
        assert float((own - guided).norm() / (unguided - guided).norm()) < 0.5


def test_no_algorithm_of_few_steps_is_left_out():
    tried = {"reflow", "consistency", "meanflow", "progressive", "guidance_distill"}
    of_latents = {name for name, own in every_algorithm().items() if own.needs.batch is LatentBatch}
    assert of_latents - {"rectified_flow"} == tried
