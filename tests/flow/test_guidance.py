from __future__ import annotations

import pytest
import torch

from flowalign.flow.guidance import cfg, cfg_norm_capped, cfg_norm_preserving, ended

Pair = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def pair(generator) -> Pair:
    return torch.randn(3, 4, 6, 8, generator=generator), torch.randn(3, 4, 6, 8, generator=generator)


def token_norms(v: torch.Tensor, patch: int) -> torch.Tensor:
    return torch.nn.functional.unfold(v, patch, stride=patch).norm(dim=1)


def test_guidance_extrapolates_from_unconditional_to_conditional():
    assert cfg(torch.tensor([[2.0]]), torch.tensor([[1.0]]), 4.5).item() == 5.5


@pytest.mark.parametrize("guide", [cfg, cfg_norm_preserving])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0, -1.0])
def test_a_scale_of_one_or_less_is_no_guidance(guide, scale, pair: Pair):
    assert guide(*pair, scale) is pair[0]
    assert torch.equal(guide(*pair, torch.tensor([scale, 3.0, scale]))[::2], pair[0][::2])


@pytest.mark.parametrize("guide", [cfg, cfg_norm_preserving])
def test_each_sample_may_have_its_own_scale(guide, pair: Pair):
    mixed = guide(*pair, torch.tensor([1.0, 3.0, 4.5]))
    for n, scale in enumerate((1.0, 3.0, 4.5)):
        assert torch.equal(mixed[n], guide(*pair, scale)[n])


@pytest.mark.parametrize("patch", [1, 2])
def test_it_keeps_the_norm_of_each_token_and_the_direction(pair: Pair, patch):
    kept, guided = cfg_norm_preserving(*pair, 4.0, patch_size=patch), cfg(*pair, 4.0)
    torch.testing.assert_close(token_norms(kept, patch), token_norms(pair[0], patch))
    ratio = (kept / guided).unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))
    torch.testing.assert_close(ratio, ratio[:, :1, :, :1, :, :1].expand_as(ratio))


def test_sequences_have_one_token_a_row(generator):
    cond, uncond = (torch.randn(2, 5, 16, generator=generator) for _ in range(2))
    torch.testing.assert_close(cfg_norm_preserving(cond, uncond, 3.0).norm(dim=-1), cond.norm(dim=-1))


def test_vanishing_guided_velocity_stays_finite():
    cond = torch.ones(1, 1, 2, 2)
    assert torch.equal(cfg_norm_preserving(cond, 2 * cond, 2.0), torch.zeros(1, 1, 2, 2))


def test_guidance_keeps_the_dtype_of_the_model(pair: Pair):
    cond, uncond = (part.bfloat16() for part in pair)
    for scale in (2.0, torch.tensor([1.0, 2.0, 3.0])):
        assert cfg(cond, uncond, scale).dtype == torch.bfloat16
        assert cfg_norm_preserving(cond, uncond, scale).dtype == torch.bfloat16


def test_odd_latents_are_refused(pair: Pair):
    with pytest.raises(ValueError, match="6x8"):
        cfg_norm_preserving(*pair, 2.0, patch_size=4)


def test_a_cap_shortens_a_whole_sample_and_only_one_that_is_guided():
    """|cond| is 5 and |guided| 10, [6, 8]: a cap of 1 halves it, one of 3 leaves it; guided by 1 it stays as it is."""
    cond, null = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
    for cap, expected in ((1.0, [[3.0, 4.0]]), (0.5, [[1.5, 2.0]]), (3.0, [[6.0, 8.0]])):
        torch.testing.assert_close(cfg_norm_capped(cond, null, 2.0, cap), torch.tensor(expected))
    assert cfg_norm_capped(cond, null, 1.0, 0.5) is cond
    two = cfg_norm_capped(cond.repeat(2, 1), null.repeat(2, 1), torch.tensor([1.0, 2.0]), 0.5)
    torch.testing.assert_close(two, torch.tensor([[3.0, 4.0], [1.5, 2.0]]))


def test_a_cap_is_over_a_sample_and_not_over_a_token():
    """A token that guidance makes three times as long stays so where the sample as a whole may be twice as long."""
    cond, null = torch.ones(1, 1, 2, 2), torch.tensor([[[[0.0, 1.0], [1.0, 1.0]]]])
    assert torch.equal(cfg_norm_capped(cond, null, 3.0, 2.0), cfg(cond, null, 3.0))


def test_guidance_ends_beyond_a_time():
    """Time runs from noise, t = 1, to the image: until 0.3 means t of 0.7 and more. What is just beyond is.

    As float32 0.3 is 0.30000001, and so beyond 0.3, as it is to the public pipeline.
    """
    scales = ended(4.0, torch.tensor([1.0, 0.75, 0.7, 0.25]), 0.3)
    assert torch.as_tensor(scales).tolist() == [4.0, 4.0, 1.0, 1.0]
    scales = ended(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 0.5]), 0.4)
    assert torch.as_tensor(scales).tolist() == [2.0, 1.0]
    assert ended(4.0, torch.tensor([0.0]), 1.0) == 4.0
