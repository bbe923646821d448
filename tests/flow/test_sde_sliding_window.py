"""Windows that move along the schedule, as MixGRPO's do."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
import torch

from flowalign.flow.schedule import sigmas
from flowalign.flow.sde import Kind, Window, window_mask

GRID = sigmas(6, 3.0)


def places(window: Window, iterations: int, kind: Kind = "flow", grid: torch.Tensor = GRID) -> list[tuple[int, int]]:
    """First step and number of steps of each iteration's window."""
    masks = [window_mask(window, kind, grid, 0.7, iteration=i).nonzero().flatten() for i in range(iterations)]
    assert all(torch.equal(mask, torch.arange(len(mask)) + mask[0]) for mask in masks)
    return [(int(mask[0]), len(mask)) for mask in masks]


def stays(window: Window, iterations: int, kind: Kind = "flow") -> list[tuple[int, int]]:
    """The places in turn, each with the number of iterations that the window stays there."""
    starts = [start for start, _ in places(window, iterations, kind)]
    return [(start, len(list(run))) for start, run in groupby(starts)]


def test_it_moves_by_its_stride_every_so_many_iterations_and_begins_anew():
    window = Window("sliding", size=2, every=3, stride=2)
    assert places(window, 11) == [(0, 2)] * 3 + [(2, 2)] * 3 + [(4, 2)] * 3 + [(0, 2)] * 2


def test_the_published_schedule_moves_one_step_every_25_iterations():
    window = Window("sliding", size=4, stop=23)
    got = places(window, 300, grid=sigmas(25, 3.0))
    assert got == [(iteration // 25, 4) for iteration in range(300)]


def test_its_last_place_ends_at_the_stop_also_where_the_stride_would_pass_it():
    assert stays(Window("sliding", size=2, every=2, stride=3), 8) == [(0, 2), (3, 2), (4, 2), (0, 2)]
    assert stays(Window("sliding", start=1, size=2, stop=4, every=2), 6) == [(1, 2), (2, 2), (1, 2)]


def test_without_wrapping_it_stays_at_its_last_place():
    assert stays(Window("sliding", size=4, every=2, wrap=False), 20) == [(0, 2), (1, 2), (2, 16)]


def test_with_exponential_decay_early_steps_get_more_iterations():
    """10·exp(-max(0, s - 1)/2) at s = 0 … 4: 10, 10, 6.07, 3.68, 2.23, rounded up."""
    window = Window("sliding", size=2, every=10, decay=0.5, decay_start=1)
    assert stays(window, 35) == [(0, 10), (1, 10), (2, 7), (3, 4), (4, 3), (0, 1)]


def test_a_strong_decay_still_leaves_every_place_one_iteration():
    window = Window("sliding", size=5, every=3, decay=1e4)
    assert stays(window, 5) == [(0, 3), (1, 1), (0, 1)]


def test_it_never_holds_a_step_without_noise():
    assert stays(Window("sliding", size=2, every=1, wrap=False), 6, "cps") == [(0, 1), (1, 1), (2, 1), (3, 3)]


def test_windows_that_do_not_slide_ignore_the_iteration():
    for window in (Window(), Window("fixed", start=1, size=2)):
        assert len({tuple(window_mask(window, "flow", GRID, 0.7, iteration=i).tolist()) for i in range(40)}) == 1


@pytest.mark.parametrize("kind", ["flow", "cps", "ode"])
def test_a_sliding_window_without_a_place_is_refused(kind):
    with pytest.raises(ValueError, match="no 7 noisy steps in a row"):
        window_mask(Window("sliding", size=7), kind, GRID, 0.7)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"size": None}, {"every": 0}, {"stride": 0}, {"decay": -0.1}])
def test_malformed_sliding_windows_are_refused(wrong):
    arguments: dict[str, Any] = {"kind": "sliding", "size": 2, **wrong}
    with pytest.raises(ValueError):
        Window(**arguments)
