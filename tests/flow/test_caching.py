from __future__ import annotations

import numpy as np
import pytest
import torch

from flowalign.flow.caching import Polynomial, StepCache, fit, relative_l1


def decisions(cache: StepCache, distances: list[list[float]]) -> list[list[bool]]:
    return [cache.decide(torch.tensor(step)).tolist() for step in distances]


def test_relative_l1_matches_a_value_by_hand():
    previous = torch.tensor([[[1.0, -1.0], [2.0, 0.0]], [[4.0, 0.0], [0.0, 4.0]]])
    current = previous + torch.tensor([[[0.5, 0.0], [0.0, -0.5]], [[2.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(relative_l1(current, previous), torch.tensor([0.25, 0.25]))


def test_polynomial_has_its_constant_first():
    x = torch.tensor([0.5, 2.0], dtype=torch.float64)
    value = Polynomial((1.0, -2.0, 3.0))(x)
    torch.testing.assert_close(value, torch.from_numpy(np.poly1d([3.0, -2.0, 1.0])(x.numpy())))
    assert value.dtype == torch.float64


def test_fit_finds_the_polynomial_that_made_the_distances(generator):
    true = Polynomial((0.02, 1.5, -20.0, 300.0, -900.0))
    x = 0.01 + 0.2 * torch.rand(60, generator=generator, dtype=torch.float64)
    found = fit(x, true(x))
    assert found.coefficients == pytest.approx(true.coefficients, rel=1e-6)


def test_fit_of_noisy_distances_is_the_least_squares_one(generator):
    x, y = torch.rand(2, 40, generator=generator, dtype=torch.float64)
    assert fit(x, y, degree=2).coefficients == pytest.approx(np.polyfit(x, y, 2)[::-1].tolist(), rel=1e-8)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([0.1] * 9, [0.2] * 9, "5 different distances, got 1"),
        ([0.1, 0.2], [0.1], "one length"),
        ([0.1, float("inf")], [0.1, 0.2], "not finite"),
    ],
)
def test_distances_that_fix_no_polynomial_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        fit(torch.tensor(x), torch.tensor(y))


def test_changes_add_up_until_they_reach_the_threshold():
    cache = StepCache(8, 0.25)
    steps = [[0.0], [0.125], [0.0625], [0.0625], [0.125], [0.125], [0.0625], [0.0]]
    assert decisions(cache, steps) == [[True], [False], [False], [True], [False], [True], [False], [True]]


def test_first_and_last_steps_are_always_computed():
    assert decisions(StepCache(4, 1e9), [[0.0]] * 4) == [[True], [False], [False], [True]]
    assert decisions(StepCache(1, 1e9), [[0.0]]) == [[True]]


@pytest.mark.parametrize("rescale", [Polynomial((0.0, 1.0)), Polynomial((-1.0, 0.5))])
def test_threshold_zero_never_reuses(rescale):
    assert decisions(StepCache(5, 0.0, rescale), [[0.0, 0.1]] * 5) == [[True, True]] * 5


def test_rescaled_changes_are_what_adds_up():
    doubled = Polynomial((0.0, 2.0))
    steps = [[0.0], [0.125], [0.125], [0.0]]
    assert decisions(StepCache(4, 0.5, doubled), steps) == [[True], [False], [True], [True]]
    assert decisions(StepCache(4, 0.5), steps) == [[True], [False], [False], [True]]


def test_negative_predicted_change_pays_nothing_back():
    falling = Polynomial((0.5, -1.0))  # -0.5 at distance 1, 0.5 at distance 0
    steps = [[0.0], [1.0], [0.0], [0.0], [0.0]]
    assert decisions(StepCache(5, 0.75, falling), steps) == [[True], [False], [False], [True], [True]]


def test_samples_decide_on_their_own():
    steps = [[0.0, 0.0], [0.5, 0.0], [0.0, 0.0], [0.0, 0.5], [0.0, 0.0]]
    alone = [[True, True], [True, False], [False, False], [False, True], [True, True]]
    assert decisions(StepCache(5, 0.5), steps) == alone


def test_observed_inputs_are_compared_with_the_step_before_reused_or_not():
    cache = StepCache(5, 0.25)
    level = torch.ones(1, 3, 4)
    made = []
    for factor in (1.0, 1.125, 1.125, 1.5, 1.5):
        level.fill_(factor)  # in place: the cache keeps a copy
        made.append(cache.observe(level).tolist())
    assert made == [[True], [False], [False], [True], [True]]


def test_distance_that_is_not_a_number_computes():
    cache = StepCache(4, 1.0)
    zeros = torch.zeros(1, 2, 2)
    assert [cache.observe(zeros).tolist() for _ in range(4)] == [[True]] * 4


def test_trajectory_longer_than_its_cache_is_refused():
    cache = StepCache(2, 0.1)
    decisions(cache, [[0.0]] * 2)
    with pytest.raises(RuntimeError, match="one for each trajectory"):
        cache.decide(torch.zeros(1))


@pytest.mark.parametrize("arguments", [(0, 0.1), (4, -0.1), (4, float("nan"))])
def test_bad_caches_are_refused(arguments):
    with pytest.raises(ValueError):
        StepCache(*arguments)
