"""Facts about levels and steps in float32, over the shifts at which a scheduler's first level is not exactly 1."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from flowalign.flow.pathfamilies import PATH_FAMILIES, PathFamily, rf_velocity
from flowalign.flow.schedule import sigmas
from flowalign.flow.sde import reverse_step
from flowalign.flow.solvers.dpmpp_2m import solve as dpmpp_2m

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks" / "grids.py"
# Of the shifts 1.00, 1.01 ... 13.00, those where the scheduler begins at 0.99999988 or 1.0000001.
ROUNDED = (
    *(1.18, 1.32, 1.43, 1.57, 1.58, 1.59, 1.66, 1.67, 1.68, 1.82, 1.83, 1.84),
    *(1.91, 1.92, 1.93, 2.07, 2.09, 2.11, 2.32, 2.34, 2.36, 2.57, 2.59, 2.61),
)


@pytest.fixture(scope="module")
def grids() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grids", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_rounded_shifts_are_those_of_the_scheduler() -> None:
    found = []
    for shift in (i / 100 for i in range(100, 1301)):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(2)
        found += [shift] if float(torch.as_tensor(scheduler.sigmas)[0]) != 1 else []
    assert tuple(found) == ROUNDED


@pytest.mark.parametrize("shift", ROUNDED)
def test_a_walk_begins_at_exactly_one_and_follows_the_scheduler(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    for num_steps in (1, 2, 10, 50):
        scheduler.set_timesteps(num_steps)
        levels = sigmas(num_steps, shift)
        assert levels[0] == 1
        torch.testing.assert_close(levels, torch.as_tensor(scheduler.sigmas), rtol=0, atol=2e-7)


def test_steps_are_exact_at_the_rounded_shifts_and_at_300_drawn_ones(grids: ModuleType) -> None:
    draw = random.Random(0)
    cases = [(shift, num_steps) for shift in ROUNDED for num_steps in (1, 2, 3, 10, 40)]
    cases += [(draw.randint(100, 1300) / 100, draw.randint(1, 50)) for _ in range(300)]
    worst = grids.sweep(cases)
    assert worst.pop("cases") == len(cases) and worst.pop("levels") <= 1e-7
    assert set(worst) == {f"{kind}/{name}" for kind in ("flow", "dance", "cps") for name in ("mean", "std")}
    assert max(worst.values()) <= 1e-5


@pytest.mark.parametrize("first", [0.9999999, 1.0000001])
def test_a_level_beside_one_is_one_to_the_flow_sde(first: float) -> None:
    x, v = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    exact, beside = (reverse_step("flow", x, v, t, 0.9, 0.7, 0.9) for t in (1.0, first))
    torch.testing.assert_close(beside.mean, exact.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(beside.std, exact.std, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", PATH_FAMILIES.values(), ids=lambda family: family.name)
def test_a_level_beside_one_gives_every_family_a_velocity(family: PathFamily) -> None:
    x = torch.randn(2, 3)
    velocity = rf_velocity(family, lambda z, t: 0.1 * z + t[:, None])
    for first in (0.9999999, 1.0000001):
        assert velocity(x, torch.full((2,), first)).isfinite().all()


def test_dpm_solver_takes_a_level_beside_one() -> None:
    x = torch.randn(2, 3)
    levels = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
    beside = levels.clone()
    beside[0] = 1.0000001
    ends = [dpmpp_2m(lambda x, t: x - t[:, None], x, grid) for grid in (levels, beside)]
    torch.testing.assert_close(ends[1], ends[0])


def test_a_shift_that_leaves_no_distance_between_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="one noise level"):
        sigmas(10, 1e9)
