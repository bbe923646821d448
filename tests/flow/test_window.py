from __future__ import annotations

import pytest
import torch

from flowalign.flow.schedule import sigmas
from flowalign.flow.sde import KINDS, Window, noisy_steps, reverse_step, window_mask

GRID = sigmas(6, 3.0)


def steps(mask: torch.Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_noisy_steps_are_those_with_a_positive_std(kind, noise_level):
    x = torch.zeros(6, 2)
    stats = reverse_step(kind, x, x, GRID[:-1], GRID[1:], noise_level, GRID[1])
    assert torch.equal(noisy_steps(kind, GRID, noise_level), stats.std.flatten() > 0)


def test_full_window_holds_every_noisy_step():
    assert steps(window_mask(Window(), "flow", GRID, 0.7)) == [0, 1, 2, 3, 4, 5]
    assert steps(window_mask(Window(), "cps", GRID, 0.7)) == [0, 1, 2, 3, 4]
    assert steps(window_mask(Window(), "ode", GRID, 0.7)) == []
    assert steps(window_mask(Window(stop=5), "flow", GRID, 0.7)) == [0, 1, 2, 3, 4]


def test_fixed_window_holds_its_steps():
    assert steps(window_mask(Window("fixed", start=1, size=3), "flow", GRID, 0.7)) == [1, 2, 3]


def test_random_window_covers_every_place_and_no_step_without_noise(generator):
    window = Window("random", size=2)
    drawn = {tuple(steps(window_mask(window, "cps", GRID, 0.7, generator))) for _ in range(200)}
    assert drawn == {(0, 1), (1, 2), (2, 3), (3, 4)}


def test_random_window_stays_inside_its_range(generator):
    window = Window("random", start=1, size=2, stop=4)
    drawn = {tuple(steps(window_mask(window, "flow", GRID, 0.7, generator))) for _ in range(100)}
    assert drawn == {(1, 2), (2, 3)}


def test_same_seed_draws_the_same_windows():
    def draw() -> list[list[int]]:
        generator = torch.Generator().manual_seed(4)
        return [steps(window_mask(Window("random", size=1), "flow", GRID, 0.7, generator)) for _ in range(20)]

    assert draw() == draw() and len({tuple(window) for window in draw()}) > 1


@pytest.mark.parametrize(
    ("window", "kind", "reason"),
    [
        (Window("fixed", start=4, size=3), "flow", "leaves the schedule of 6 steps"),
        (Window("fixed", start=6, size=1), "flow", "leaves the schedule of 6 steps"),
        (Window(start=6), "flow", "leaves the schedule of 6 steps"),
        (Window(stop=7), "flow", "leaves the schedule of 6 steps"),
        (Window("fixed", start=4, size=2), "cps", "without noise"),
        (Window("random", size=6), "cps", "no 6 noisy steps"),
        (Window("random", size=7), "flow", "no 7 noisy steps"),
        (Window("random", size=1), "ode", "no 1 noisy steps"),
    ],
)
def test_window_that_leaves_the_schedule_or_the_noise_is_refused(window, kind, reason, generator):
    with pytest.raises(ValueError, match=reason):
        window_mask(window, kind, GRID, 0.7, generator)


def test_random_window_without_generator_is_refused():
    with pytest.raises(ValueError, match="generator"):
        window_mask(Window("random", size=1), "flow", GRID, 0.7)


@pytest.mark.parametrize(
    "arguments", [{"kind": "slide"}, {"kind": "fixed"}, {"kind": "random", "size": 0}, {"start": -1}]
)
def test_malformed_windows_are_refused(arguments):
    with pytest.raises(ValueError):
        Window(**arguments)
