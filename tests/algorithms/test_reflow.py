"""Reflow: a coupling whose lines do not cross is learned to loss 0, and then one step is exact."""

import math
from dataclasses import replace

import pytest
import torch

from flowalign.algorithms import build_algorithm
from flowalign.flow import schedule
from flowalign.flow.path import per_sample
from flowalign.flow.solvers.euler import solve as euler
from flowalign.types import LatentBatch
from tests.algorithms.toy import SHAPE, ConstantVelocity, TwoMaps, condition
from tests.algorithms.whole import prepare

MEAN, STD = 1.5, 0.4
LOSSES = ["squared", "pseudo_huber", "lpips_huber", "lpips_huber_over_t"]


def straight(x, t, condition=None, **options):
    """The velocity of the optimal coupling of N(0, 1) and N(1.5, 0.4²), whose lines never cross."""
    t = per_sample(t, x)
    return (1 - STD) * (x - (1 - t) * MEAN) / ((1 - t) * STD + t) - MEAN


def batch(coupled=True, count=64, seed=3):
    noise = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))
    return LatentBatch(MEAN + STD * noise, condition(count), seed, noise if coupled else None)


def loss_of(config, models, made):
    algorithm = build_algorithm({"type": "reflow", **config})
    return algorithm.loss(models, prepare(algorithm, made, None, models)).loss.detach()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_of_an_optimal_coupling_is_0_at_its_straight_velocity(loss):
    models = {"policy": straight, "features": TwoMaps()}
    assert float(loss_of({"loss": loss}, models, batch())) < 1e-4
    assert float(loss_of({"loss": loss}, models, batch(coupled=False))) > 1e-2


def test_one_euler_step_of_that_velocity_is_exact():
    made = batch()
    assert made.noise_NCHW is not None
    for steps in (1, 3):
        x0 = euler(straight, made.noise_NCHW, schedule.sigmas(steps))
        torch.testing.assert_close(x0, made.latents_NCHW, rtol=1e-5, atol=1e-5)


def test_each_loss_by_hand_at_one_point():
    # Data (3, 4), noise (1, 1): the target is (-2, -3). Velocity (-2, -2) misses by (0, 1), so the predicted clean
    # latent is (3, 4 - t); features are the latents themselves.
    latents, noise = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), torch.ones(1, 2, 1, 1)
    made = LatentBatch(latents, condition(1), 0, noise)
    models = {"policy": ConstantVelocity(-2.0, -2.0), "features": lambda x: [x]}
    algorithm = build_algorithm({"type": "reflow"})
    t = float(prepare(algorithm, made, None, models).tensors["t"])
    huber = math.sqrt(1 + 0.25) - 0.5
    found, length = (3.0, 4 - t), math.hypot(3, 4 - t)
    lpips = (found[0] / length - 0.6) ** 2 + (found[1] / length - 0.8) ** 2
    expected = [0.5, huber, (1 - t) * huber / 2 + lpips, (1 - t) * huber / 2 + lpips / t]
    for loss, value in zip(LOSSES, expected, strict=True):
        config = {"loss": loss} if loss == "squared" else {"loss": loss, "c": 0.5}
        assert float(loss_of(config, models, made)) == pytest.approx(value, rel=1e-4)


def test_pairs_keep_their_noise_and_real_data_gets_a_fresh_one():
    made = batch(count=1000)
    assert made.noise_NCHW is not None
    algorithm = build_algorithm({"type": "reflow"})
    assert torch.equal(prepare(algorithm, made, None, {}).tensors["noise"], made.noise_NCHW)
    fresh = prepare(algorithm, replace(made, noise_NCHW=None), None, {}).tensors["noise"]
    assert not (fresh == made.noise_NCHW).any() and 0.9 < float(fresh.std()) < 1.1


def test_times_are_u_shaped():
    t = prepare(build_algorithm({"type": "reflow"}), batch(count=4000), None, {}).tensors["t"]
    outer = ((t < 0.1) | (t > 0.9)).float().mean()
    assert float(outer) == pytest.approx(1 - math.sinh(1.6) / math.sinh(2.0), abs=0.02)


def test_features_are_needed_by_the_perceptual_losses_alone():
    needs = [build_algorithm({"type": "reflow", "loss": loss}).needs.features for loss in LOSSES]
    assert needs == [False, False, True, True]


def test_a_c_without_a_use_and_unknown_density_parameters_are_refused():
    with pytest.raises(ValueError, match="c: the squared loss"):
        build_algorithm({"type": "reflow", "loss": "squared", "c": 0.1})
    with pytest.raises(ValueError, match="density_params"):
        build_algorithm({"type": "reflow", "density_params": {"m": 0}})
