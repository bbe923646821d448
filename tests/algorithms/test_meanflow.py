"""MeanFlow: the target against finite differences and closed forms, its guidance and weights by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from flowalign.algorithms import build_algorithm
from flowalign.algorithms.meanflow import curvature
from flowalign.flow.path import per_sample
from flowalign.models.inputs import add_inputs, pooled_with_inputs
from flowalign.shapes.build.pipeline import new_transformer
from flowalign.types import LatentBatch, value_of
from tests.algorithms.few_steps import Gaussian
from tests.algorithms.toy import SHAPE, condition
from tests.algorithms.whole import prepare
from tests.conditions import text_condition

T, R = torch.tensor([0.9, 0.6, 0.5]), torch.tensor([0.1, 0.4, 0.5])


class TinyNetwork(nn.Module):
    """A smooth function of a state (2, 1, 1), t and r, in float64."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)).double()

    def forward(self, x, t, condition, *, r):
        return self.layers(torch.cat([x.flatten(1), t[:, None], r[:, None]], 1)).reshape(x.shape)


def by_differences(policy, x, velocity, t, r, condition, h):
    """``(t - r) (v ∂_x u + ∂_t u)`` by one central difference."""
    with torch.no_grad():
        ahead = policy(x + h * velocity, t + h, condition, r=r)
        behind = policy(x - h * velocity, t - h, condition, r=r)
    return per_sample(t - r, x) * (ahead - behind) / (2 * h)


def prepared(count=200, latents=None, pooled=0.0, **config):
    algorithm = build_algorithm({"type": "meanflow", **config})
    if latents is None:
        latents = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))
    own = condition(len(latents))
    own = replace(own, text={**own.text, "pooled": own.text["pooled"] + pooled})
    return algorithm, prepare(algorithm, LatentBatch(latents, own, 0), None, {})


def test_the_curvature_is_that_of_finite_differences():
    policy, generator = TinyNetwork(), torch.Generator().manual_seed(1)
    x, velocity = torch.randn(2, 3, 2, 1, 1, generator=generator, dtype=torch.float64)
    arguments = (policy, x, velocity, T.double(), R.double(), condition(3))
    found = curvature(*arguments)
    torch.testing.assert_close(found, by_differences(*arguments, 1e-5), rtol=1e-6, atol=1e-8)
    assert bool(found[:2].all()) and not found[2].any()


@pytest.fixture(scope="module")
def transformer() -> Any:
    """A real, tiny SD3 transformer with the input r, none of its layers zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = new_transformer(16, 16, num_layers=2, num_heads=1)
        add_inputs(network, ["r"])
        for parameter in network.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.05)
    return network


def policy_of(network):
    def velocity(x, t, condition, *, r=None, **options):
        tokens, pooled = condition.expand().values()
        return network(
            hidden_states=x,
            encoder_hidden_states=tokens,
            pooled_projections=pooled_with_inputs(pooled, t, r, names=("r",)),
            timestep=1000 * t,
            return_dict=False,
        )[0]

    return velocity


def latents_and_condition():
    generator = torch.Generator().manual_seed(2)
    x, velocity = torch.randn(2, 3, 16, 8, 8, generator=generator)
    tokens, pooled = torch.randn(1, 4, 16, generator=generator), torch.randn(1, 16, generator=generator)
    return x, velocity, text_condition(tokens, pooled, torch.zeros(3, dtype=torch.long), tokens[0] * 0, pooled[0] * 0)


def test_the_curvature_of_a_real_transformer_is_that_of_finite_differences(transformer):
    x, velocity, own = latents_and_condition()
    arguments = (policy_of(transformer), x, velocity, T, R, own)
    found, expected = curvature(*arguments), by_differences(*arguments, 3e-5)
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert float(found[:2].flatten(1).norm(dim=1).min()) > 0.1 and not found[2].any()


def test_a_real_transformer_learns_with_checkpointed_activations(transformer):
    x, _, own = latents_and_condition()
    algorithm = build_algorithm({"type": "meanflow", "equal_fraction": 0.3, "omega": 0.5})
    train = prepare(algorithm, LatentBatch(x, own, 1), None, {})
    assert bool((train.tensors["r"] < train.tensors["t"]).any())
    gradients = []
    for checkpointed in (False, True):
        transformer.train(checkpointed)
        (transformer.enable_gradient_checkpointing if checkpointed else transformer.disable_gradient_checkpointing)()
        loss = algorithm.loss({"policy": policy_of(transformer)}, train).loss
        gradients.append(torch.autograd.grad(loss, list(transformer.parameters()), allow_unused=True))
    transformer.disable_gradient_checkpointing()
    pairs = [(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None]
    assert len(pairs) > 60 and all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)
    assert any("inputs.r" in name for name, p in transformer.named_parameters() if p.requires_grad)


def test_a_gaussians_average_velocity_keeps_the_meanflow_identity():
    world, generator = Gaussian(), torch.Generator().manual_seed(3)
    x = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    t, r = T[:2].double(), R[:2].double()
    velocity = world.velocity(x, t)
    found = velocity - curvature(world.average, x, velocity, t, r, condition(2))
    torch.testing.assert_close(found, world.average(x, t, r=r))


def test_the_loss_is_0_where_all_data_are_one_point_and_the_velocity_its_straight_one():
    algorithm, train = prepared(latents=torch.full((50, *SHAPE), 2.0), equal_fraction=0.3)

    def straight(x, t, condition, *, r=None, **options):
        return (x - 2) / per_sample(t, x)

    metrics = algorithm.loss({"policy": straight}, train).metrics
    assert float(value_of(metrics["loss/average_velocity_mse"])) < 1e-8


def test_the_gradient_flows_through_the_average_velocity_and_not_through_the_target():
    policy = TinyNetwork()
    latents = torch.randn(20, 2, 1, 1, generator=torch.Generator().manual_seed(4)).double()
    algorithm, train = prepared(latents=latents, equal_fraction=0.2, adaptive_power=0)
    item = {k: v.double() if v.is_floating_point() else v for k, v in train.tensors.items()}
    train = replace(train, tensors=item)
    parameters = list(policy.parameters())
    found = torch.autograd.grad(algorithm.loss({"policy": policy}, train).loss, parameters)
    t = per_sample(item["t"], latents)
    x, velocity = (1 - t) * item["x0"] + t * item["noise"], item["noise"] - item["x0"]
    target = velocity - by_differences(policy, x, velocity, item["t"], item["r"], train.condition, 1e-5)
    error = policy(x, item["t"], train.condition, r=item["r"]) - target
    expected = torch.autograd.grad(error.square().sum() / 20, parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_times_are_ordered_and_three_quarters_alike():
    _, train = prepared(count=2000)
    t, r = train.tensors["t"], train.tensors["r"]
    assert bool((r <= t).all())
    assert float((r == t).float().mean()) == pytest.approx(0.75, abs=0.03)


def test_guidance_mixes_the_data_with_both_of_the_networks_own_velocities():
    # The network says 7 for the prompt (pooled 1) and 3 without; dropped samples keep the plain velocity.
    def policy(x, t, condition, *, r=None, **options):
        return torch.where(condition.expand()["pooled"].view(-1, 1, 1, 1) == 0, 3.0, 7.0).expand(x.shape)

    options = {"omega": 0.5, "kappa": 0.2, "adaptive_power": 0, "condition_dropout": 0.4}
    algorithm, train = prepared(pooled=1.0, **options)
    plain, dropped = train.tensors["noise"] - train.tensors["x0"], train.tensors["dropped"]
    assert 50 < int(dropped.sum()) < 110
    guided = 0.5 * plain + 0.2 * 7 + 0.3 * 3
    errors = torch.where(dropped.view(-1, 1, 1, 1), plain - 3, guided - 7)
    found = algorithm.loss({"policy": policy}, train).loss
    torch.testing.assert_close(found, errors.square().flatten(1).sum(1).mean())


def test_guidance_mixes_each_sample_of_latents_with_another_number_of_dimensions():
    def policy(x, t, condition, *, r=None, **options):
        return torch.zeros_like(x)

    latents = torch.randn(4, 2, 4, 3, 2, generator=torch.Generator().manual_seed(0))  # as many channels as samples
    algorithm, train = prepared(latents=latents, omega=0.5, adaptive_power=0, condition_dropout=0.4)
    plain, dropped = train.tensors["noise"] - train.tensors["x0"], train.tensors["dropped"]
    assert 0 < int(dropped.sum()) < 4
    share = torch.tensor([1.0 if sample else 0.5 for sample in dropped.tolist()])
    expected = (plain.square().flatten(1).sum(1) * share**2).mean()
    torch.testing.assert_close(algorithm.loss({"policy": policy}, train).loss, expected)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_adaptive_weight_divides_each_samples_error_by_its_power(power):
    algorithm, train = prepared(equal_fraction=1, adaptive_power=power, c=0.1, condition_dropout=0)
    value = torch.tensor(0.5, requires_grad=True)
    error = (train.tensors["noise"] - train.tensors["x0"] - 0.5).square().flatten(1).sum(1)
    loss = algorithm.loss({"policy": lambda x, t, condition, **options: value.expand(x.shape)}, train).loss
    torch.testing.assert_close(loss.detach(), (error / (error + 0.1) ** power).mean())
    slope = -2 * (train.tensors["noise"] - train.tensors["x0"] - 0.5).flatten(1).sum(1)
    expected = (slope / (error + 0.1) ** power).mean()  # the weight is not differentiated
    torch.testing.assert_close(torch.autograd.grad(loss, value)[0], expected, rtol=1e-4, atol=1e-6)


def test_guidance_without_dropped_conditions_is_refused():
    with pytest.raises(ValueError, match="condition_dropout"):
        build_algorithm({"type": "meanflow", "omega": 2, "condition_dropout": 0})


def test_another_density_starts_from_its_own_parameters():
    assert build_algorithm({"type": "meanflow", "density": "uniform"}).config.density_params == {}
    assert build_algorithm({"type": "meanflow"}).config.density_params == {"m": -0.4, "s": 1.0}
