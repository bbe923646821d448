from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg

from flowalign.config.sections import SHIPPED
from flowalign.measure.distances import (
    ImageMetricsError,
    frechet_distance,
    kernel_distance,
    precision_recall,
    rank_deficient,
)

CLIP = SHIPPED / "open_clip"


def normal(seed: int, count: int, width: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, scale, (count, width))


def frechet_by_square_root(a: np.ndarray, b: np.ndarray) -> float:
    """The formula as printed, with a matrix square root."""
    root = np.real(scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)))
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root))


def test_the_frechet_distance_is_that_of_the_printed_formula() -> None:
    mix = normal(2, 6, 6)
    a, b = normal(0, 80, 6), normal(1, 50, 6, shift=0.3) @ mix
    assert frechet_distance(a, b) == pytest.approx(frechet_by_square_root(a, b), rel=1e-9)


def test_two_gaussians_are_as_far_apart_as_the_closed_form_says() -> None:
    # One variance a direction: Σ (μa - μb)² + (σa - σb)².
    count, width = 40_000, 3
    a, b = normal(0, count, width), normal(1, count, width, shift=2.0) * [1, 2, 3]
    expected = (2**2 + 0) + (4**2 + 1) + (6**2 + 4)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=0.02)


def test_a_set_is_at_distance_0_from_itself_in_any_order_and_however_few_its_images() -> None:
    for count in (5, 40):
        a = normal(0, count, 12, shift=30.0)
        assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-10)


def test_the_frechet_distance_is_symmetric_with_fewer_images_than_features_too() -> None:
    a, b = normal(0, 7, 20), normal(1, 9, 20, scale=2.0)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    lifted_a, lifted_b = np.cov(a.T), np.cov(b.T)
    eigenvalues = np.sqrt(np.maximum(np.linalg.eigvals(lifted_a @ lifted_b).real, 0)).sum()
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(lifted_a + lifted_b) - 2 * eigenvalues
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)


def test_fewer_images_make_the_distance_of_one_distribution_larger() -> None:
    few, many = (frechet_distance(normal(0, n, 16), normal(1, n, 16)) for n in (20, 2000))
    assert few > 10 * many > 0


def test_a_covariance_is_of_full_rank_from_one_image_more_than_features_on() -> None:
    for count in (10, 11):
        rank = np.linalg.matrix_rank(np.cov(normal(0, count, 10).T))
        assert rank_deficient(count, 10) == (rank < 10)


def kernel_distance_in_loops(a: np.ndarray, b: np.ndarray) -> float:
    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float(sum(x * y) / len(x) + 1) ** 3

    within_a = [k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j]
    within_b = [k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j]
    across = [k(x, y) for x in a for y in b]
    return float(np.mean(within_a) + np.mean(within_b) - 2 * np.mean(across))


def test_the_kernel_distance_is_that_of_a_sum_over_pairs() -> None:
    a, b = normal(0, 11, 5), normal(1, 7, 5, shift=0.5)
    assert kernel_distance(a, b) == pytest.approx(kernel_distance_in_loops(a, b), rel=1e-12)


def test_the_kernel_distance_of_one_distribution_is_0_on_average_with_few_images_too() -> None:
    values = [kernel_distance(normal(2 * i, 8, 4), normal(2 * i + 1, 8, 4)) for i in range(800)]
    error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * error
    assert min(values) < 0
    apart = [kernel_distance(normal(2 * i, 8, 4), normal(2 * i + 1, 8, 4, shift=0.5)) for i in range(800)]
    assert np.mean(apart) > 10 * error


def test_sets_larger_than_a_block_are_summed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(0, 50, 3), normal(1, 41, 3, shift=0.4)
    whole = kernel_distance(a, b), *precision_recall(a, b)
    monkeypatch.setattr("flowalign.measure.distances._ROWS", 7)
    assert (kernel_distance(a, b), *precision_recall(a, b)) == pytest.approx(whole, rel=1e-12)


def test_precision_and_recall_of_points_in_the_plane_by_hand() -> None:
    real = np.array([[0.0, 0], [1, 0], [0, 1]])  # radii for k = 1: 1, 1, 1
    fake = np.array([[0.0, -1], [0, -1.5], [9, 9]])  # radii: 0.5, 0.5, √(81 + 100)
    # (0, -1) lies on the ball around (0, 0), which holds it; the ball of (9, 9) reaches every real.
    assert precision_recall(real, fake, k=1) == (1 / 3, 1.0)
    # Without the far point no fake's ball of 0.5 reaches a real.
    assert precision_recall(real, fake[:2], k=1) == (1 / 2, 0.0)


def test_a_generator_that_makes_one_kind_is_precise_without_recall_and_noise_the_reverse() -> None:
    two_kinds = np.concatenate([normal(0, 40, 2), normal(1, 40, 2, shift=50)])
    one_kind, everything = normal(2, 80, 2), np.random.default_rng(3).uniform(-60, 110, (80, 2))
    precise, complete = precision_recall(two_kinds, one_kind), precision_recall(two_kinds, everything)
    assert precise.precision > 0.9 and precise.recall <= 0.5
    assert complete.precision < 0.1 and complete.recall > 0.9


def precision_in_loops(real: np.ndarray, fake: np.ndarray, k: int) -> float:
    inside = 0
    for f in fake:
        for i, r in enumerate(real):
            others = sorted(math.dist(r, other) for j, other in enumerate(real) if j != i)
            if math.dist(f, r) <= others[k - 1]:
                inside += 1
                break
    return inside / len(fake)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_those_of_a_search_over_all_points(k: int) -> None:
    real, fake = normal(0, 40, 4), normal(1, 30, 4, shift=0.7)
    expected = precision_in_loops(real, fake, k), precision_in_loops(fake, real, k)
    assert precision_recall(real, fake, k=k) == expected
    assert 0 < min(expected) and max(expected) < 1


def test_identical_sets_are_all_within_each_other() -> None:
    assert precision_recall(normal(0, 20, 6), normal(0, 20, 6)) == (1, 1)


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (np.zeros((5, 3)), np.zeros((5, 4)), r"\(5, 3\) and \(5, 4\); give two arrays"),
        (np.zeros(5), np.zeros(5), "give two arrays"),
        (np.zeros((1, 3)), np.zeros((9, 3)), "sets of 1 and 9 images; give at least"),
        (np.full((5, 3), np.nan), np.zeros((5, 3)), "not all finite"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(a: np.ndarray, b: np.ndarray, said: str) -> None:
    for metric in (frechet_distance, kernel_distance, precision_recall):
        with pytest.raises(ImageMetricsError, match=said):
            metric(a, b)
