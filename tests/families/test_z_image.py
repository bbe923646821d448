"""What is Z-Image's own: a cap and an end of guidance, a static shift, captions that its network pads itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.config.sections import ModelConfig
from flowalign.models.base import Policy
from flowalign.models.inspect import own_schedule
from tests.families.ours import LENGTH, our_latents, our_policy
from tests.families.public import apart, initial_noise

SHORT = "a red cube"
NAMES = ("z_image", "z_image-turbo")


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def policy(tiny: Callable[..., Path], name: str) -> Policy:
    return our_policy(tiny(name))


def test_a_cap_and_an_end_of_guidance_matter(policy: Policy) -> None:
    call: dict[str, Any] = {"noise": initial_noise(1, (64, 64)), "num_steps": 5, "guidance": 5.0, "size": (64, 64)}
    changes: list[dict[str, Any]] = [{}, {"norm_cap": 1.0}, {"until": 0.15}]
    made, *others = (our_latents(policy, [SHORT], **call, **change) for change in changes)
    assert all(apart(other, made) > 0.01 for other in others)


def test_levels_are_those_of_a_static_shift_at_every_size(tiny: Callable[..., Path], name: str) -> None:
    """1, 3/4, 1/2, 1/4, each shifted once: s t / (1 + (s - 1) t)."""
    shift = {"z_image": 6, "z_image-turbo": 3}[name]
    expected = [shift * t / (1 + (shift - 1) * t) for t in (1, 0.75, 0.5, 0.25, 0)]
    for height in (64, 128):
        own = own_schedule(ModelConfig(path=str(tiny(name)), height=height, width=64))
        torch.testing.assert_close(own.levels(4), torch.tensor(expected))


def test_padding_of_the_condition_takes_no_part(policy: Policy) -> None:
    """A caption's mask decides what the network sees: rows that are padded further give the same bits."""
    short, long = (policy.encoders.encode_prompts([SHORT], LENGTH, full=full) for full in (False, True))
    assert (short.text["tokens"].shape[1], long.text["tokens"].shape[1]) == (32, LENGTH)
    x, t = initial_noise(1, (64, 64)), torch.tensor([0.5])
    assert torch.equal(*(policy.network.velocity(x, t, condition) for condition in (short, long)))
