"""Guidance distillation: the guided teacher itself has loss 0, with one guidance or one a sample."""

import pytest
import torch

from flowalign.algorithms import build_algorithm
from flowalign.flow.path import per_sample
from flowalign.types import Guidance, LatentBatch
from tests.algorithms.toy import SHAPE
from tests.algorithms.whole import prepare
from tests.conditions import text_condition

NULL, PROMPT = 2.0, 5.0


def prompted(count):
    pooled = torch.full((1, 1), PROMPT)
    return text_condition(
        torch.zeros(1, 1, 1), pooled, torch.zeros(count, dtype=torch.long), torch.zeros(1, 1), pooled[0] * 0
    )


def teacher(x, t, condition, *, guidance=None, **options):
    """``x t`` plus 5 for a prompt or 2 for none; guided between the two."""
    own = torch.where(condition.expand()["pooled"][:, :1] == 0, NULL, PROMPT).view(-1, 1, 1, 1)
    scale = per_sample(1.0 if guidance is None else guidance.scale, x)
    return x * per_sample(t, x) + NULL + scale * (own - NULL)


def prepared(**config):
    algorithm = build_algorithm({"type": "guidance_distill", **config})
    latents = torch.randn(200, *SHAPE, generator=torch.Generator().manual_seed(0))
    return algorithm, prepare(algorithm, LatentBatch(latents, prompted(200), 0), None, {})


def test_a_student_that_is_the_guided_teacher_has_loss_0():
    def student(x, t, condition, *, guidance=None, **options):
        assert guidance is None, "a student of one guidance is called without"
        return teacher(x, t, condition, guidance=Guidance(3.0))

    algorithm, train = prepared()
    assert float(algorithm.loss({"policy": student, "teacher": teacher}, train).loss) == 0
    # The unguided teacher misses by (3 - 1) (5 - 2) everywhere.
    assert float(algorithm.loss({"policy": teacher, "teacher": teacher}, train).loss) == pytest.approx(36)


def test_a_student_that_is_told_its_guidance_has_loss_0_where_it_follows_it():
    seen = []

    def student(x, t, condition, *, guidance=None, **options):
        assert guidance is not None
        seen.append(guidance.scale)
        return teacher(x, t, condition, guidance=guidance)

    algorithm, train = prepared(guidance_range=[1, 5])
    assert float(algorithm.loss({"policy": student, "teacher": teacher}, train).loss) < 1e-10
    assert seen[0].shape == (200,) and 1 <= seen[0].min() < 1.2 and 4.8 < seen[0].max() <= 5
    ignoring = {"policy": lambda *args, **options: teacher(*args, guidance=Guidance(3.0)), "teacher": teacher}
    # g uniform in [1, 5] has the variance 4/3; the miss is (g - 3) (5 - 2).
    assert float(algorithm.loss(ignoring, train).loss) == pytest.approx(9 * 4 / 3, rel=0.15)


def test_a_dropped_condition_is_taught_the_unconditional_velocity():
    algorithm, train = prepared(guidance_range=[1, 5], condition_dropout=1)
    models = {"policy": lambda x, t, *args, **options: x * per_sample(t, x) + NULL, "teacher": teacher}
    assert float(algorithm.loss(models, train).loss) < 1e-10


def test_the_input_is_declared_where_it_is_needed():
    assert prepared()[0].needs.inputs == () and prepared(guidance_range=[1, 5])[0].needs.inputs == ("guidance",)


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match="guidance_range"):
        build_algorithm({"type": "guidance_distill", "guidance_range": [5, 1]})
