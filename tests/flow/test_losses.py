"""Pseudo-Huber and feature distances, by hand."""

import math

import pytest
import torch

from flowalign.flow.losses import feature_distance, pseudo_huber


def test_the_pseudo_huber_of_3_4_within_c_12_is_1():
    assert pseudo_huber(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 12.0).tolist() == [1.0, 0.0]


def test_its_default_c_is_54e_5_times_the_root_of_the_dimensions():
    difference = torch.full((1, 4, 2, 2), 1e-3)
    c = 0.00054 * 4
    assert float(pseudo_huber(difference)) == pytest.approx(math.sqrt(16e-6 + c * c) - c, rel=1e-5)


def test_far_from_0_it_is_the_norm_and_near_it_a_parabola():
    direction = torch.tensor([[0.6, 0.8]])
    assert float(pseudo_huber(1e3 * direction, 0.1)) == pytest.approx(1e3 - 0.1, rel=1e-6)
    assert float(pseudo_huber(1e-6 * direction, 0.1)) == pytest.approx(1e-12 / 0.2, rel=1e-4)


def test_its_gradient_at_0_is_0():
    difference = torch.zeros(2, 3, requires_grad=True)
    pseudo_huber(difference).sum().backward()
    assert difference.grad is not None and not difference.grad.any()


def test_features_are_compared_by_direction_averaged_over_places_and_summed_over_layers():
    # Two places: perpendicular (squared distance 2) and parallel (0). A second layer: opposite directions (4).
    first = torch.tensor([[[2.0, 1.0], [0.0, 1.0]]]), torch.tensor([[[0.0, 5.0], [3.0, 5.0]]])
    second = torch.tensor([[[1.0], [-1.0]]]), torch.tensor([[[-7.0], [7.0]]])
    found = feature_distance([first[0], second[0]], [first[1], second[1]])
    torch.testing.assert_close(found, torch.tensor([1.0 + 4.0]))


def test_no_layers_or_unequal_ones_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        feature_distance([], [])
    with pytest.raises(ValueError, match="zip"):
        feature_distance([torch.ones(1, 2, 3)], [])
