"""Progressive distillation: the target is the chord of two teacher steps, at the times of the student's own sampler."""

import pytest
import torch

from flowalign.algorithms.progressive import Progressive
from flowalign.flow import schedule
from flowalign.flow.solvers.euler import solve as euler
from flowalign.types import LatentBatch
from tests.algorithms.few_steps import Gaussian
from tests.algorithms.toy import SHAPE, ConstantVelocity, LinearVelocity, condition
from tests.algorithms.whole import prepare


def progressive(**config) -> Progressive:
    return Progressive(Progressive.Config.model_validate({"type": "progressive", **config}))


def prepared(**config):
    algorithm = progressive(**config)
    latents = torch.randn(100, *SHAPE, generator=torch.Generator().manual_seed(0))
    return algorithm, prepare(algorithm, LatentBatch(latents, condition(100), 0), None, {})


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (4, 1.0), (5, 3.0)])
def test_the_teachers_times_are_those_of_the_grid_with_twice_the_steps(steps, shift):
    begin, middle, end = progressive(num_steps=steps, shift=shift).times()
    doubled = schedule.sigmas(2 * steps, shift=shift, grid="paper")
    torch.testing.assert_close(torch.stack([begin, middle], 1).flatten(), doubled[:-1])
    assert float(end[-1]) == 0 and torch.equal(end[:-1], begin[1:])


def test_the_middle_of_a_step_lies_within_it_on_the_other_grid_too():
    begin, middle, end = progressive(num_steps=4, shift=3, grid="diffusers").times()
    torch.testing.assert_close(begin, schedule.sigmas(4, shift=3.0)[:-1])
    assert bool(((begin > middle) & (middle > end)).all())


def test_a_student_step_along_the_chord_leads_where_two_teacher_steps_do():
    teacher = Gaussian().velocity
    algorithm, train = prepared(num_steps=3, shift=2.0)
    chord = algorithm.chord({"teacher": teacher}, train.tensors, train.condition)
    doubled = schedule.sigmas(6, shift=2.0, grid="paper")
    for step in range(3):
        own = (train.tensors["t"] == doubled[2 * step]).nonzero().flatten()
        assert len(own) > 20
        x = train.tensors["x"][own]
        led = euler(teacher, x, doubled[2 * step : 2 * step + 3])
        delta = doubled[2 * step + 2] - doubled[2 * step]
        torch.testing.assert_close(x + delta * chord[own], led, rtol=1e-5, atol=1e-5)


def test_the_chord_of_a_linear_teacher_by_hand():
    # One step from t = 1 to 0 in halves, slope v = 2 x: x (1 - 1) (1 - 1) = 0, so the chord is x itself.
    algorithm, train = prepared(num_steps=1)
    teacher = LinearVelocity()
    with torch.no_grad():
        teacher.weight.fill_(2)
        teacher.bias.zero_()
    torch.testing.assert_close(
        algorithm.chord({"teacher": teacher}, train.tensors, train.condition), train.tensors["x"]
    )


def test_a_student_of_a_straight_teacher_has_loss_0_and_guidance_is_the_teachers():
    algorithm, train = prepared(guidance_scale=3)
    teacher = LinearVelocity()
    with torch.no_grad():
        teacher.weight.zero_()
        teacher.bias.fill_(1)
    # Guidance adds 0.1 times its scale to this teacher.
    models = {"policy": ConstantVelocity(1.3, 1.3), "teacher": teacher}
    assert float(algorithm.loss(models, train).loss) == pytest.approx(0, abs=1e-12)
    models["policy"] = ConstantVelocity(1.0, 1.0)
    assert float(algorithm.loss(models, train).loss) == pytest.approx(0.09, rel=1e-5)


def test_the_states_are_noised_data_at_the_students_times_each_alike():
    _, train = prepared(num_steps=2, shift=3)
    t = train.tensors["t"]
    assert sorted(set(t.tolist())) == [0.75, 1.0] and 30 < int((t == 1).sum()) < 70
