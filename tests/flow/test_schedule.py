from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from flowalign.flow.schedule import resolution_shift, shift_sigma, sigmas


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.15, 3.0, 6.5])
def test_diffusers_grid_is_bitwise_the_schedulers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    for num_steps in [*range(1, 31), 50, 1000]:
        scheduler.set_timesteps(num_steps)
        assert torch.equal(sigmas(num_steps, shift), torch.as_tensor(scheduler.sigmas)), num_steps


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.5])
def test_paper_grid_is_the_schedulers_with_linear_sigmas_shifted_once(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    for num_steps in (1, 4, 10, 28):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps).tolist())
        torch.testing.assert_close(sigmas(num_steps, shift, grid="paper"), scheduler.sigmas, rtol=0, atol=1e-6)


def test_diffusers_grid_with_shift_three_has_the_published_values():
    expected = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    torch.testing.assert_close(sigmas(10, 3.0), torch.tensor(expected), rtol=0, atol=5e-5)


@pytest.mark.parametrize("grid", ["diffusers", "paper"])
def test_grid_falls_from_one_to_zero(grid):
    values = sigmas(28, 3.0, grid=grid)
    assert values.shape == (29,) and values.dtype == torch.float32
    assert values[0] == 1 and values[-1] == 0 and (values.diff() < 0).all()


def test_shift_keeps_the_ends_and_matches_a_value_by_hand():
    assert shift_sigma(0.0, 3.0) == 0 and shift_sigma(1.0, 3.0) == 1
    assert shift_sigma(0.5, 3.0) == pytest.approx(0.75)
    torch.testing.assert_close(shift_sigma(torch.tensor([0.5, 0.1]), 3.0), torch.tensor([0.75, 0.25]))


def test_resolution_shift_is_the_root_of_the_pixel_ratio():
    assert resolution_shift(1024 * 1024, 256 * 256) == pytest.approx(4)


def test_shifts_compose_by_multiplication():
    assert shift_sigma(shift_sigma(0.3, 2.0), 1.5) == pytest.approx(shift_sigma(0.3, 3.0))


@pytest.mark.parametrize("arguments", [{"num_steps": 0}, {"num_steps": 4, "shift": 0.0}, {"num_steps": 4, "grid": "x"}])
def test_bad_schedules_are_refused(arguments):
    with pytest.raises(ValueError):
        sigmas(**arguments)
