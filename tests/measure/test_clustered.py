"""Means and differences of samples that come in clusters, against textbooks, a bootstrap and simulated comparisons."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from flowalign.measure.clustered import clustered_mean, paired_difference

SIZE, PROMPTS, TASKS = 600, 150, 6


def test_one_sample_a_prompt_is_the_textbook_s_mean_and_error() -> None:
    mean = clustered_mean([1, 0, 1, 0], "abcd")
    assert (mean.value, mean.degrees) == (0.5, 3)
    assert mean.standard_error == pytest.approx(math.sqrt(1 / 3) / 2)


def test_samples_of_one_prompt_count_as_one_where_they_say_the_same() -> None:
    thrice = clustered_mean(np.repeat([1.0, 0, 1, 0], 3), np.repeat(list("abcd"), 3).tolist())
    assert thrice.standard_error == pytest.approx(clustered_mean([1, 0, 1, 0], "abcd").standard_error)


def test_an_interval_by_hand() -> None:
    # Six prompts in one task, two samples each. Differences by prompt: 2, 1, 1, 1, -1, 2 of 12: their mean is 1/2.
    before, after = [0] * 8 + [1, 0, 0, 0], [1, 1, 1, 0, 1, 0, 1, 0, 0, 0, 1, 1]
    prompts = [p for p in "abcdef" for _ in range(2)]
    # Sums of d - 1/2: 1, 0, 0, 0, -2, 1; their squares are 6; variance 6/5 · 6 / 144 = 0.05, degrees of freedom 5.
    found = paired_difference(before, after, prompts)
    half = 2.5705818356363146 * math.sqrt(0.05)  # t of 97.5 % and 5 degrees, from a table
    assert (found.value, found.prompts, found.differ) == (0.5, 6, 6)
    assert found.standard_error == pytest.approx(math.sqrt(0.05))
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half))
    assert found.verdict == "no difference shown"


def test_the_error_over_tasks_is_that_of_their_mean_and_a_prompt_of_two_tasks_counts_once() -> None:
    x, y = math.sqrt(1 / 3) / 2, 1.0  # as `test_the_standard_error_of_a_task_…` has them
    apart = clustered_mean([1, 0, 1, 0, 3, 5], "abcdef", "xxxxyy")
    assert apart.value == (0.5 + 4) / 2 and apart.standard_error == pytest.approx(math.hypot(x, y) / 2)
    assert apart.degrees == pytest.approx((x**2 + y**2) ** 2 / (x**4 / 3 + y**4 / 1))
    # The same prompt is high in both tasks, so what it adds comes together: u = ½ · √2 · (±½) / 2 in each.
    both = clustered_mean([1, 0, 1, 0], "abab", "xxyy")
    assert both.standard_error == pytest.approx(2 * math.sqrt(2) * 0.25 * 0.5 * math.sqrt(2))


def test_equal_scores_differ_by_nothing_and_show_nothing() -> None:
    scores = np.random.default_rng(0).random(SIZE)
    found = paired_difference(scores, scores, [i % PROMPTS for i in range(SIZE)])
    assert (found.value, found.standard_error, found.differ) == (0.0, 0.0, 0)
    assert found.verdict == "no difference shown"


def test_fewer_than_six_prompts_that_differ_show_nothing() -> None:
    before = np.zeros(100)
    verdicts = [paired_difference(before, np.arange(100) < count, range(100)).verdict for count in range(8)]
    assert verdicts == ["no difference shown"] * 6 + ["better"] * 2
    assert paired_difference(np.arange(100) < 6, before, range(100)).verdict == "worse"
    few = paired_difference(before[:5], before[:5] + 1, range(5))  # all better, of five prompts
    assert few.value == 1 and few.verdict == "no difference shown" and math.isnan(few.low)


def test_one_prompt_tells_nothing_of_others() -> None:
    found = paired_difference(np.zeros(50), np.ones(50), [0] * 50)
    assert found.value == 1 and math.isnan(found.standard_error) and found.verdict == "no difference shown"


def draw(rng: np.random.Generator, gain: float = 0.0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Verdicts of two models on four samples of each prompt. Each model has prompts of its own that it is good at."""
    hard = rng.normal(0, 1, PROMPTS)
    rates = [1 / (1 + np.exp(-(hard + rng.normal(shift, 1.5, PROMPTS)))) for shift in (0.0, gain)]
    before, after = ((rng.random((SIZE // PROMPTS, PROMPTS)) < rate).astype(float).ravel() for rate in rates)
    return before, after


PROMPT_N = [i % PROMPTS for i in range(SIZE)]
TASK_N = [i % PROMPTS % TASKS for i in range(SIZE)]


def test_the_interval_is_that_of_a_bootstrap_over_prompts() -> None:
    """2,000 resamples of the prompts of each task; the ends agree within a tenth of the interval's half width."""
    rng = np.random.default_rng(3)
    before, after = draw(rng, gain=0.7)
    found = paired_difference(before, after, PROMPT_N, TASK_N)
    by_prompt = (after - before).reshape(-1, PROMPTS).mean(0)
    rows = [np.arange(task, PROMPTS, TASKS) for task in range(TASKS)]
    drawn = [by_prompt[own[rng.integers(0, len(own), (2000, len(own)))]].mean(1) for own in rows]
    ends = np.percentile(np.mean(drawn, 0), [2.5, 97.5])
    assert found.verdict == "better" and found.low < np.mean(drawn) < found.high
    assert np.abs(np.array([found.low, found.high]) - ends).max() < 0.1 * (found.high - found.low) / 2


def test_of_200_comparisons_of_equal_models_5_in_100_show_a_difference() -> None:
    rng = np.random.default_rng(0)
    by_prompt, by_sample = [], []
    for _ in range(200):
        before, after = draw(rng)
        by_prompt.append(paired_difference(before, after, PROMPT_N, TASK_N).verdict)
        by_sample.append(paired_difference(before, after, range(SIZE), TASK_N).verdict)
    shown = sum(verdict != "no difference shown" for verdict in by_prompt)
    assert 4 <= shown <= 16 and by_prompt.count("better") <= 16
    # Taken for independent, the same samples show one far too often: they are not.
    assert sum(verdict != "no difference shown" for verdict in by_sample) > 20
