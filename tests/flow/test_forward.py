"""Points of the forward process: what a sample draws is its own."""

import pytest
import torch

from flowalign.flow import density, forward

SIGMAS = (1.0, 0.8, 0.5, 0.2, 0.0)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_the_grid_gives_each_noise_level_once_before_one_twice_and_never_zero() -> None:
    drawn = forward.times("grid", 6, torch.Generator().manual_seed(0), SIGMAS)
    levels = torch.tensor(SIGMAS[:-1])
    assert torch.equal(drawn[:4].sort(descending=True).values, levels)
    assert len(set(drawn[4:].tolist())) == 2 and all(value in levels for value in drawn[4:])


def test_another_kind_is_the_density_of_that_name() -> None:
    drawn = forward.times("logit_normal", 5, torch.Generator().manual_seed(3), SIGMAS, m=1.0, s=0.5)
    assert torch.equal(drawn, density.sample("logit_normal", (5,), torch.Generator().manual_seed(3), m=1.0, s=0.5))


@pytest.mark.parametrize("kind", ["grid", "uniform"])
def test_a_sample_draws_the_same_in_every_batch(kind: str) -> None:
    t, noise = forward.draw(kind, 3, (2, 4), generators(0, 1, 2), SIGMAS)
    assert t.shape == (3, 3) and noise.shape == (3, 3, 2, 4)
    for order in ([2, 0], [1], [2, 1, 0]):
        t_part, noise_part = forward.draw(kind, 3, (2, 4), generators(*order), SIGMAS)
        assert torch.equal(t_part, t[order]) and torch.equal(noise_part, noise[order])
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(noise[0, 0], noise[0, 1])


def test_no_sample_draws_nothing() -> None:
    t, noise = forward.draw("grid", 3, (2, 4), [], SIGMAS)
    assert t.shape == (0, 3) and noise.shape == (0, 3, 2, 4)


def test_the_velocity_error_is_a_mean_over_a_samples_own_dimensions() -> None:
    velocity, target = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]]), torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]]])
    assert forward.velocity_error(velocity, target).tolist() == [2.5, 4.5]  # (1 + 4) / 2, (0 + 9) / 2
