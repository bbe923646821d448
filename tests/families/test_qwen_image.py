"""Qwen-Image: our walk is the public pipeline's, and what we train it loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.export import export
from flowalign.intake.file import load_align
from flowalign.models.base import Policy
from flowalign.models.errors import ModelError
from flowalign.models.families.qwen_image import FAMILY
from flowalign.models.inspect import inspect_model, own_schedule
from flowalign.samples.opened import open_policy
from flowalign.samples.sampled import sample_checkpoint, sampled_model
from tests.families.ours import (
    LENGTH,
    assert_an_iteration_is_exported,
    our_latents,
    our_policy,
    replay_difference,
    write_run,
)
from tests.families.public import apart, initial_noise, public_latents, public_pipeline, public_pixels
from tests.tiny import run_config, write_checkpoint

Public = Callable[..., Any]
SHORT, LONG = "a red cube", "two small dogs run over the grass near the old house, with a zebra and a camel"
BAD = "blurry low quality picture"
WALKS: dict[str, dict[str, Any]] = {
    "plain": {"prompts": [SHORT]},
    "unguided": {"prompts": [SHORT, LONG], "guidance": 1.0, "negative": BAD, "size": (96, 64)},
    "guided": {"prompts": [SHORT], "guidance": 4.0, "negative": "", "size": (96, 64)},
    "negative": {"prompts": [SHORT, LONG], "guidance": 4.0, "negative": BAD},
    "lengths": {"prompts": [SHORT, LONG + ", " + LONG], "guidance": 2.5, "negative": LONG, "size": (80, 112)},
    "large": {"prompts": [SHORT], "guidance": 4.0, "negative": " ", "size": (256, 192)},
}


@pytest.fixture(scope="module")
def policy(tiny: Callable[..., Path]) -> Policy:
    return our_policy(tiny("qwen_image"))


@pytest.mark.parametrize("walk", WALKS)
def test_our_latents_are_those_of_the_public_pipeline(policy: Policy, public: Public, walk: str) -> None:
    """Within 1e-5 of the largest value, and pixels within a level."""
    asked = {"guidance": 1.0, "size": (64, 96), "num_steps": 4, **WALKS[walk]}
    prompts, noise = asked.pop("prompts"), initial_noise(len(WALKS[walk]["prompts"]), asked["size"])
    ours = our_latents(policy, prompts, noise=noise, **asked)
    model = public("qwen_image")
    theirs = public_latents(model, prompts, noise=noise, max_sequence_length=LENGTH, **asked)
    assert apart(ours, theirs) <= 1e-5
    pixels = public_pixels(model, prompts, noise=noise, max_sequence_length=LENGTH, **asked)
    assert (policy.encoders.decode(ours).int() - pixels.int()).abs().max() <= 1


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_stochastic_rollout_replays_bit_for_bit(tiny: Callable[..., Path], dtype: Any, guidance: float) -> None:
    prompts = [SHORT, SHORT, "a blue ball", "a blue ball"]
    assert replay_difference(our_policy(tiny("qwen_image"), dtype), prompts, guidance) == 0


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_sample_alone_has_the_bits_that_it_has_among_others_of_its_bucket(policy: Policy, guidance: float) -> None:
    """Texts of 8 to 32 tokens fill one bucket; what they are padded with is masked."""
    prompts = [SHORT, "a photo of a small blue ball", "a green table near the old house"]
    noise = initial_noise(3, (64, 64))
    call: dict[str, Any] = {"num_steps": 3, "guidance": guidance, "size": (64, 64), "geometry": 4, "negative": BAD}
    together = our_latents(policy, prompts, noise=noise, **call)
    for row, prompt in enumerate(prompts):
        assert torch.equal(our_latents(policy, [prompt], noise=noise[row : row + 1], **call), together[row : row + 1])


def test_lengths_are_counted_as_prompts_are_encoded(policy: Policy) -> None:
    """By the tokenizer alone; line breaks at the ends, marks of the template and what is cut included."""
    count = policy.network.family.count_tokens
    assert count is not None
    for prompt in ("", SHORT, LONG, "\n\na red cube \n", "<|im_end|>\n", "crème brûlée 猫", 30 * LONG):
        for length in (16, LENGTH):
            encoded = policy.encoders.encode_prompts([prompt], length).text["mask"]
            assert count(policy.encoders.pipeline.tokenizer, prompt, length) == encoded.sum()


@pytest.mark.parametrize("kind", ["pipeline", "lora"])
def test_exports_are_loaded_by_plain_diffusers(tiny: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """With the latents of the trained policy; `export` compares both layouts of a LoRA before it keeps them."""
    base = tiny("qwen_image")
    asked: dict[str, Any] = {"num_steps": 4, "guidance": 4.0, "size": (64, 64), "noise": initial_noise(2, (64, 64))}
    asked["negative"] = BAD
    model = {"path": str(base), "max_sequence_length": LENGTH, "lora": {"rank": 4, "alpha": 6}}
    config = run_config(base, model={**model, "height": 64, "width": 64})
    write_checkpoint(tmp_path / "run", config)
    made = export(tmp_path / "run", tmp_path / "out", kind=kind, config=config)
    assert max(made.velocity_error, made.latents_error) <= 1e-5
    ours = our_latents(open_policy(tmp_path / "run", config)[0], [SHORT, LONG], **asked)
    plain = public_pipeline(base if kind == "lora" else made.path)
    if kind == "lora":
        before = public_latents(plain, [SHORT, LONG], max_sequence_length=LENGTH, **asked)
        plain.load_lora_weights(str(made.path))
        assert apart(before, ours) > 0.01
    theirs = public_latents(plain, [SHORT, LONG], max_sequence_length=LENGTH, **asked)
    assert apart(theirs, ours) <= 1e-5
    assert "true_cfg_scale=1," in (made.path / "README.md").read_text()


def test_an_iteration_of_flow_grpo_ends_in_an_export(tiny: Callable[..., Path], tmp_path: Path) -> None:
    assert_an_iteration_is_exported(tmp_path, tiny("qwen_image"))


def test_a_published_model_is_planned_without_its_files() -> None:
    """The numbers of the repository, and those of its classes on the meta device with its configuration files."""
    sizes, published = inspect_model(ModelConfig(path="absent/Qwen-Image")), FAMILY.published["qwen-image"]
    assert (sizes.transformer, sizes.width, sizes.num_layers) == (20_430_401_088, 3072, 60)
    assert (sizes.latent_shape, sizes.image_tokens, sizes.text_tokens) == ((16, 128, 128), 4096, 256)
    assert sizes.source.endswith("whose files take 57.7 GB")
    text: dict[str, Any] = {"hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064}
    text |= {"num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    with torch.device("meta"):
        encoder = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
        )
        parts = {
            "transformer": QwenImageTransformer2DModel(**published.parts["transformer"]),
            "text_encoder": encoder,
            "vae": AutoencoderKLQwenImage(base_dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2),
        }
    counted = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert counted == {"transformer": sizes.transformer, **sizes.frozen}


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
