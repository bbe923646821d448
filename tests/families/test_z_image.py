"""Z-Image and Z-Image-Turbo: our walk is the public pipeline's, and what we train it loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from flowalign.config.sections import ModelConfig
from flowalign.export import export
from flowalign.models.base import Policy
from flowalign.models.families.z_image import FAMILY
from flowalign.models.inspect import inspect_model, own_schedule
from flowalign.samples.opened import open_policy
from tests.families.ours import LENGTH, assert_an_iteration_is_exported, our_latents, our_policy, replay_difference
from tests.families.public import apart, initial_noise, public_latents, public_pipeline, public_pixels
from tests.tiny import run_config, write_checkpoint

Public = Callable[..., Any]
SHORT, LONG = "a red cube", "two small dogs run over the grass near the old house, with a zebra and a camel"
BAD = "blurry low quality picture"
NAMES = ("z_image", "z_image-turbo")
WALKS: dict[str, dict[str, Any]] = {
    "plain": {"prompts": [SHORT]},
    "guided": {"prompts": [SHORT], "guidance": 5.0, "size": (96, 64)},
    "negative": {"prompts": [SHORT, LONG], "guidance": 5.0, "negative": BAD},
    "lengths": {"prompts": [SHORT, LONG + ", " + LONG], "guidance": 3.5, "size": (80, 112)},
    "capped": {"prompts": [SHORT, LONG], "guidance": 5.0, "norm_cap": 1.0, "num_steps": 5},
    "shorter": {"prompts": [SHORT, LONG], "guidance": 5.0, "norm_cap": 0.6, "until": 0.2, "num_steps": 5},
    "truncated": {"prompts": [SHORT], "guidance": 5.0, "until": 0.3, "num_steps": 7},
}


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def policy(tiny: Callable[..., Path], name: str) -> Policy:
    return our_policy(tiny(name))


@pytest.mark.parametrize("walk", WALKS)
def test_our_latents_are_those_of_the_public_pipeline(policy: Policy, public: Public, name: str, walk: str) -> None:
    """Within 1e-5 of the largest value, and pixels within a level; unguided they are the same to the bit."""
    asked = {"guidance": 1.0, "size": (64, 96), "num_steps": 4, **WALKS[walk]}
    prompts, noise = asked.pop("prompts"), initial_noise(len(WALKS[walk]["prompts"]), asked["size"])
    ours = our_latents(policy, prompts, noise=noise, **asked)
    asked["guidance"] -= FAMILY.guidance_offset
    renamed = {"norm_cap": "cfg_normalization", "until": "cfg_truncation"}
    call = {renamed.get(key, key): value for key, value in asked.items()}
    theirs = public_latents(public(name), prompts, noise=noise, max_sequence_length=LENGTH, **call)
    assert apart(ours, theirs) <= (1e-5 if asked["guidance"] else 0)
    pixels = public_pixels(public(name), prompts, noise=noise, max_sequence_length=LENGTH, **call)
    assert (policy.encoders.decode(ours).int() - pixels.int()).abs().max() <= 1


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_stochastic_rollout_replays_bit_for_bit(tiny: Callable[..., Path], dtype: Any, guidance: float) -> None:
    prompts = [SHORT, SHORT, "a blue ball", "a blue ball"]
    assert replay_difference(our_policy(tiny("z_image"), dtype), prompts, guidance) == 0


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_sample_alone_has_the_bits_that_it_has_among_others_of_its_bucket(policy: Policy, guidance: float) -> None:
    """Captions of 11 to 24 tokens fill one bucket of 32: the rest is the network's own padding."""
    prompts = [SHORT, "a photo of a small blue ball", "a green table near the old house"]
    noise = initial_noise(3, (64, 64))
    call: dict[str, Any] = {"num_steps": 3, "guidance": guidance, "size": (64, 64), "geometry": 4}
    together = our_latents(policy, prompts, noise=noise, **call)
    for row, prompt in enumerate(prompts):
        assert torch.equal(our_latents(policy, [prompt], noise=noise[row : row + 1], **call), together[row : row + 1])


def test_padding_of_the_condition_takes_no_part(policy: Policy) -> None:
    """A caption's mask decides what the network sees: rows that are padded further give the same bits."""
    short, long = (policy.encoders.encode_prompts([SHORT], LENGTH, full=full) for full in (False, True))
    assert (short.text["tokens"].shape[1], long.text["tokens"].shape[1]) == (32, LENGTH)
    x, t = initial_noise(1, (64, 64)), torch.tensor([0.5])
    assert torch.equal(*(policy.network.velocity(x, t, condition) for condition in (short, long)))


def test_lengths_are_counted_as_prompts_are_encoded(policy: Policy) -> None:
    """By the tokenizer alone; line breaks at the ends, marks of the template and what is cut included."""
    count = policy.network.family.count_tokens
    assert count is not None
    for prompt in ("", SHORT, LONG, "\n\na red cube \n", "<|im_end|>\n", "crème brûlée 猫", 30 * LONG):
        for length in (16, LENGTH):
            encoded = policy.encoders.encode_prompts([prompt], length).text["mask"]
            assert count(policy.encoders.pipeline.tokenizer, prompt, length) == encoded.sum()


@pytest.mark.parametrize("kind", ["pipeline", "lora"])
def test_exports_are_loaded_by_plain_diffusers(tiny: Callable[..., Path], tmp_path: Path, name: str, kind: str) -> None:
    """With the latents of the trained policy; `export` compares both layouts of a LoRA before it keeps them."""
    base = tiny(name)
    asked: dict[str, Any] = {"num_steps": 4, "size": (64, 64), "noise": initial_noise(2, (64, 64))}
    model = {"path": str(base), "max_sequence_length": LENGTH, "lora": {"rank": 4, "alpha": 6}}
    config = run_config(base, model={**model, "height": 64, "width": 64})
    write_checkpoint(tmp_path / "run", config)
    made = export(tmp_path / "run", tmp_path / "out", kind=kind, config=config)
    assert max(made.velocity_error, made.latents_error) <= 1e-5
    ours = our_latents(open_policy(tmp_path / "run", config)[0], [SHORT, LONG], guidance=4.0, **asked)
    plain = public_pipeline(base if kind == "lora" else made.path)
    if kind == "lora":
        before = public_latents(plain, [SHORT, LONG], guidance=3.0, max_sequence_length=LENGTH, **asked)
        plain.load_lora_weights(str(made.path))
        assert apart(before, ours) > 0.01
    theirs = public_latents(plain, [SHORT, LONG], guidance=3.0, max_sequence_length=LENGTH, **asked)
    assert apart(theirs, ours) <= 1e-5
    assert "guidance_scale=0," in (made.path / "README.md").read_text()  # ours of 1, which is none


def test_an_iteration_of_flow_grpo_ends_in_an_export(tiny: Callable[..., Path], tmp_path: Path) -> None:
    assert_an_iteration_is_exported(tmp_path, tiny("z_image-turbo"))


@pytest.mark.parametrize("model", ["Z-Image", "Z-Image-Turbo"])
def test_a_published_model_is_planned_without_its_files(model: str) -> None:
    """The numbers of the repository, and those of its classes on the meta device with its configuration files."""
    sizes, published = inspect_model(ModelConfig(path=f"absent/{model}")), FAMILY.published[model.lower()]
    assert (sizes.transformer, sizes.width, sizes.num_layers) == (6_154_908_736, 3840, 34)
    assert (sizes.latent_shape, sizes.image_tokens, sizes.text_tokens) == ((16, 128, 128), 4096, 256)
    assert sizes.source.endswith("Z-Image" if published.file_bytes is None else "whose files take 32.9 GB")
    text: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    text |= {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936}
    vae: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
    vae |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        parts = {
            "transformer": ZImageTransformer2DModel(**published.parts["transformer"]),
            "text_encoder": Qwen3Model(Qwen3Config(**text, tie_word_embeddings=True)),
            "vae": AutoencoderKL(**vae, use_quant_conv=False, use_post_quant_conv=False),
        }
    counted = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert counted == {"transformer": sizes.transformer, **sizes.frozen}
