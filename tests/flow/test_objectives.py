"""Terms of losses against numbers worked out by hand."""

from typing import get_args

import pytest
import torch

from flowalign.flow import objectives
from flowalign.flow.density import DENSITIES, Name
from flowalign.types import value_of


def test_the_surrogate_takes_the_worse_of_ratio_and_clipped_ratio() -> None:
    ratio, advantage = torch.tensor([0.5, 0.5, 2.0, 2.0, 1.05]), torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    # -A·ratio is -0.5, 0.5, -2, 2, -2.1; -A·clip(ratio, 0.9, 1.2) is -0.9, 0.9, -1.2, 1.2, -2.1.
    loss, metrics = objectives.clipped_surrogate(ratio.log(), advantage, 0.1, 0.2)
    assert float(loss) == pytest.approx((-0.5 + 0.9 - 1.2 + 2.0 - 2.1) / 5)
    assert float(value_of(metrics["ratio/clip_fraction"])) == pytest.approx(4 / 5)
    assert float(value_of(metrics["ratio/mean"])) == pytest.approx(6.05 / 5)


def test_an_item_is_divided_by_its_own_number() -> None:
    loss, _ = objectives.clipped_surrogate(
        torch.zeros(2), torch.tensor([1.0, 1.0]), 0.1, 0.1, over=torch.tensor([2, 4])
    )
    assert float(loss) == pytest.approx(-(1 / 2 + 1 / 4) / 2)


def test_the_kl_to_a_reference_is_the_mean_square_and_its_gradient_is_the_policy_s() -> None:
    velocity = torch.tensor([[1.0, 3.0], [0.0, 0.0]], requires_grad=True)
    kl, metrics = objectives.reference_kl(velocity, torch.tensor([[0.0, 1.0], [0.0, 2.0]]))
    assert float(kl) == pytest.approx(((1 + 4) / 2 + 4 / 2) / 2)
    kl.backward()
    assert velocity.grad is not None and velocity.grad.tolist() == [[0.5, 1.0], [0.0, -1.0]]
    assert not value_of(metrics["loss/kl"]).requires_grad


def test_every_density_has_its_name_in_the_configurations() -> None:
    assert set(get_args(Name)) == set(DENSITIES)
