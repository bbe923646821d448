"""What is Qwen-Image's own: levels, lengths of velocities, latents of films, guidance by a negative prompt alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.intake.file import load_align
from flowalign.models.base import Policy
from flowalign.models.errors import ModelError
from flowalign.models.inspect import own_schedule
from flowalign.samples.sampled import sample_checkpoint, sampled_model
from tests.families.ours import LENGTH, our_policy, write_run
from tests.tiny import run_config

Public = Callable[..., Any]
SHORT = "a red cube"


@pytest.fixture(scope="module")
def policy(tiny: Callable[..., Path]) -> Policy:
    return our_policy(tiny("qwen_image"))


def test_levels_follow_the_size_and_end_at_a_fiftieth(tiny: Callable[..., Path]) -> None:
    """1, 3/4, 1/2, 1/4 shifted by e^mu, mu linear in the tokens; then 1 - (1 - s) 0.98 / (1 - last)."""
    for height, tokens in ((64, 16), (512, 128)):
        shift = np.exp(0.5 + (0.9 - 0.5) * (tokens - 256) / (8192 - 256))
        levels = [shift * t / (1 + (shift - 1) * t) for t in (1, 0.75, 0.5, 0.25)]
        expected = [*(1 - (1 - level) * 0.98 / (1 - levels[-1]) for level in levels), 0.0]
        own = own_schedule(ModelConfig(path=str(tiny("qwen_image")), height=height, width=64))
        torch.testing.assert_close(own.levels(4).double(), torch.tensor(expected), rtol=1e-5, atol=1e-6)
        assert abs(expected[-2] - 0.02) < 1e-9


def test_a_guided_token_is_as_long_as_the_conditional_one(policy: Policy) -> None:
    """Without that a walk is another one: it is the family that says so, and no option."""
    assert policy.network.keeps_token_norms


def test_pictures_are_encoded_as_films_of_one_frame(policy: Policy, public: Public) -> None:
    """(mean - m) / deviation, channel by channel: what the public pipeline's way back to pixels undoes."""
    images = torch.randint(0, 256, (2, 64, 96, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    made = policy.encoders.encode_images(images)
    vae = public("qwen_image").vae
    pixels = images.permute(0, 3, 1, 2).float().div(127.5).sub(1)
    with torch.no_grad():
        expected = vae.encode(pixels.unsqueeze(2)).latent_dist.mode()[:, :, 0]
    mean, deviation = (torch.tensor(v).view(1, 16, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    assert made.shape == (2, 16, 8, 12)
    torch.testing.assert_close(made, (expected - mean) / deviation)


@pytest.mark.parametrize("option", ["guidance_embeds", "use_additional_t_cond"])
def test_what_the_public_pipeline_cannot_sample_is_refused_by_name(tiny: Callable[..., Path], option: str) -> None:
    directory = tiny("qwen_image", transformer={option: True})
    with pytest.raises(ModelError, match=f"model.path: {option} is set"):
        our_policy(directory)


def test_guidance_without_a_negative_prompt_is_refused_before_a_run(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The public pipeline would not guide, and say nothing. A model's negative prompt will do, or one of every row."""
    path = write_run(tmp_path, tiny("qwen_image"))
    guided = "algorithm.guidance_scale=4.0"
    with pytest.raises(ConfigError, match=r"algorithm\.guidance_scale: 4 guides nothing: Qwen-Image .*give model\.neg"):
        load_align(path, [guided])
    with pytest.raises(ConfigError, match=r"evaluation\.guidance_scale: 3 guides nothing"):
        load_align(path, ["evaluation.every=1", "evaluation.guidance_scale=3", "evaluation.prompts=prompts.jsonl"])
    assert load_align(path, [guided, "model.negative_prompt=''"]).config.model.negative_prompt == ""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(prompts.read_text().replace("}", ', "negative_prompt": " "}'))
    load_align(path, [guided])
    prompts.write_text(prompts.read_text() + '{"prompt": "a red cube"}\n')
    with pytest.raises(ConfigError, match="guides nothing"):
        load_align(path, [guided])


def test_guidance_without_a_negative_prompt_is_refused_before_samples(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    config = run_config(tiny("qwen_image"), model={"path": str(tiny("qwen_image")), "max_sequence_length": LENGTH})
    model = sampled_model(tiny("qwen_image"), config, guidance_scale=4.0)
    with pytest.raises(ConfigError, match="--guidance-scale: 4 guides nothing"):
        sample_checkpoint(model, [SHORT], tmp_path / "samples")
    assert not (tmp_path / "samples").exists()
