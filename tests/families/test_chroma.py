"""What is Chroma's own: a mask that weighs, on texts that all have one length, and a scheduler's own shift."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.config.sections import ModelConfig
from flowalign.models.inspect import own_schedule
from tests.families.ours import LENGTH, our_latents, our_policy
from tests.families.public import apart, initial_noise, public_latents
from tests.families.tiny import DYNAMIC

Build = Callable[..., Path]
LONG = "two small dogs run over the grass near the old house, with a zebra"
TEXTS = ["a red cube", 20 * LONG]
SIZES = [(64, 96), (128, 80), (256, 192)]
BY_SIZE = {**DYNAMIC, "use_dynamic_shifting": True}


def test_the_token_behind_a_text_counts_as_the_text_does(tiny: Build) -> None:
    """A text of 4 tokens, its end included, has 5 ones, and one that is cut has a one for each token."""
    encoders = our_policy(tiny("chroma")).encoders
    for text, ones in zip(TEXTS, (5, LENGTH), strict=True):
        attended = encoders.encode_prompts([text], LENGTH).text["attended"]
        assert attended[0].tolist() == [1.0] * ones + [0.0] * (LENGTH - ones)


def test_levels_have_a_static_shift_at_every_size(tiny: Build) -> None:
    """1, 3/4, 1/2, 1/4, each shifted once: 3 t / (1 + 2 t)."""
    for height, width in SIZES:
        own = own_schedule(ModelConfig(path=str(tiny("chroma")), height=height, width=width))
        torch.testing.assert_close(own.levels(4), torch.tensor([3 * t / (1 + 2 * t) for t in (1, 0.75, 0.5, 0.25, 0)]))


@pytest.mark.parametrize("size", SIZES)
def test_a_shift_that_follows_the_size_is_walked_as_the_pipeline_does(tiny: Build, public: Any, size: Any) -> None:
    """Chroma1-HD's is static; other checkpoints have a scheduler of their own."""
    call: dict[str, Any] = {"noise": initial_noise(2, size), "num_steps": 4, "guidance": 3.0, "size": size}
    ours = our_latents(our_policy(tiny("chroma", scheduler=BY_SIZE)), TEXTS, **call)
    theirs = public_latents(public("chroma", scheduler=BY_SIZE), TEXTS, max_sequence_length=LENGTH, **call)
    assert apart(ours, theirs) <= 1e-5
