"""Consistency distillation: the exact consistency function has loss 0 as the teacher's steps shrink."""

import pytest
import torch

from flowalign.algorithms import build_algorithm
from flowalign.types import Guidance, LatentBatch
from tests.algorithms.few_steps import Gaussian
from tests.algorithms.toy import SHAPE, ConstantVelocity, LinearVelocity, condition
from tests.algorithms.whole import prepare

WORLD = Gaussian()


def prepared(count=500, latents=None, **config):
    algorithm = build_algorithm({"type": "consistency", **config})
    if latents is None:
        latents = WORLD.mean + WORLD.std * torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))
    return algorithm, prepare(algorithm, LatentBatch(latents, condition(len(latents)), 0), None, {})


def exact_loss(steps: int, **config) -> float:
    algorithm, train = prepared(num_steps=steps, skip=1, loss="squared", **config)
    # Its last step, to t = 0, is where one Euler step is least exact; the rest shows the order.
    train = train.take((train.tensors["s"] > 0).nonzero().flatten())
    models = {"policy": WORLD.consistent, "ema": WORLD.consistent, "teacher": WORLD.velocity}
    return float(algorithm.loss(models, train).loss)


def test_the_loss_of_the_exact_consistency_function_vanishes_with_the_teachers_step():
    # A step's error is of order h², or h³ with Heun; the loss is its square.
    euler, heun = ([exact_loss(steps, solver=solver) for steps in (20, 40)] for solver in ("euler", "heun"))
    assert euler[0] / euler[1] > 10 and heun[0] / heun[1] > 30
    assert heun[1] < euler[1] < 1e-5


def test_at_data_the_target_is_the_teachers_state_itself_whatever_the_average_says():
    # From t = 1 to 0 at once: the teacher leads to x - 2, the student to x - 5.
    algorithm, train = prepared(num_steps=1, skip=1, loss="squared")
    teacher, policy = ConstantVelocity(2.0, 2.0), ConstantVelocity(5.0, 5.0)
    for average in (0.0, 100.0):
        models = {"policy": policy, "teacher": teacher, "ema": ConstantVelocity(average, average)}
        assert float(algorithm.loss(models, train).loss.detach()) == pytest.approx(9, rel=1e-5)


def test_a_heun_step_to_data_is_an_euler_step():
    losses = []
    for solver in ("euler", "heun"):
        algorithm, train = prepared(num_steps=1, skip=1, solver=solver)
        models = {"policy": WORLD.consistent, "ema": WORLD.consistent, "teacher": WORLD.velocity}
        losses.append(float(algorithm.loss(models, train).loss))
    assert losses[0] == losses[1] > 0


def test_without_a_teacher_both_states_lie_on_one_line_of_data_and_noise():
    # All data at one point: every line ends there, and x - t v finds it exactly for v = (x - point) / t.
    algorithm, train = prepared(latents=torch.full((50, *SHAPE), 2.0), teacher="none")
    assert algorithm.needs.roles == ("policy", "ema")

    def velocity(x, t, *args, **options):
        return (x - 2) / t.clamp_min(1e-6).view(-1, 1, 1, 1)

    assert float(algorithm.loss({"policy": velocity, "ema": velocity}, train).loss) < 1e-4
    # Networks that say 0 leave the states where they are: (t - s) (noise - x0) apart.
    still, item = ConstantVelocity(0.0, 0.0), train.tensors
    apart = (item["t"] - item["s"]).view(-1, 1, 1, 1) * (item["noise"] - item["x0"])
    found = algorithm.loss({"policy": still, "ema": still}, train).metrics["loss/consistency_mse"]
    torch.testing.assert_close(found, apart.square().mean(), rtol=1e-4, atol=0)


def test_skip_spans_steps_of_the_grid_and_ends_at_data():
    _, train = prepared(num_steps=10, skip=3, grid="paper")
    t, s = train.tensors["t"], train.tensors["s"]
    torch.testing.assert_close(s, (t - 0.3).clamp_min(0), rtol=0, atol=1e-6)
    assert float(t.min()) == pytest.approx(0.1) and float(t.max()) == 1


def test_the_teachers_guidance_is_asked_for_and_the_students_is_not():
    seen = []

    def teacher(x, t, condition, *, guidance=None, **options):
        seen.append(guidance)
        return torch.zeros_like(x)

    algorithm, train = prepared(guidance_scale=4, solver="heun")
    policy = LinearVelocity()

    def student(x, t, condition, **options):
        assert not options
        return policy(x, t, condition)

    algorithm.loss({"policy": student, "ema": student, "teacher": teacher}, train)
    assert seen == [Guidance(4.0), Guidance(4.0)]


def test_the_target_carries_no_gradient_even_of_the_policy_itself():
    algorithm, train = prepared(loss="squared")
    policy = LinearVelocity()
    models = {"policy": policy, "ema": policy, "teacher": WORLD.velocity}
    own = torch.autograd.grad(algorithm.loss(models, train).loss, policy.bias)[0]
    models["ema"] = LinearVelocity()  # the same weights, another network
    other = torch.autograd.grad(algorithm.loss(models, train).loss, policy.bias)[0]
    assert torch.equal(own, other) and bool(own.any())


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"num_steps": 10}, "skip"),
        ({"teacher": "none", "guidance_scale": 3}, "teacher"),
        ({"teacher": "none", "solver": "heun"}, "teacher"),
        ({"loss": "squared", "c": 0.1}, "c"),
    ],
)
def test_options_that_contradict_each_other_are_refused_by_name(config, named):
    with pytest.raises(ValueError, match=f"{named}: "):
        build_algorithm({"type": "consistency", **config})
