"""FLUX.1 dev and schnell: our walk is the public pipeline's, replays exactly, and what we train it loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flowalign.algorithms import build_algorithm
from flowalign.config.alignment import AlignConfig
from flowalign.export import export
from flowalign.intake.file import load_align
from flowalign.models.base import Policy
from flowalign.models.families import flux
from flowalign.models.loading import assembled
from flowalign.models.packing import packed, unpacked
from flowalign.plan import make_plan
from flowalign.record.metrics import read_metrics
from flowalign.run.roles import roles_of
from flowalign.samples.opened import open_policy
from tests.families.ours import (
    LENGTH,
    alone_and_among_others,
    card_class,
    flowalign,
    our_latents,
    our_policy,
    replay_difference,
    write_run,
)
from tests.families.public import apart, initial_noise, public_latents, public_pipeline, public_pixels, recorded
from tests.tiny import run_config, write_checkpoint

Build = Callable[..., Path]
Public = Callable[..., Any]
NAMES = ("flux-dev", "flux-schnell")
SHORT, LONG = "a red cube", "two small dogs run over the grass near the old house, with a zebra"
BAD = "blurry low quality picture"
WIDE, TALL, LARGE = (64, 96), (128, 80), (192, 128)
# What we are asked, and the public pipeline in other words.
WALKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dev, number 1": ("flux-dev", {"guidance": 1.0}, {}),
    "dev, number 3.5": ("flux-dev", {"guidance": 3.5, "size": TALL}, {}),
    "dev, large": ("flux-dev", {"guidance": 3.5, "size": LARGE}, {}),
    "dev, true": ("flux-dev", {"guidance": 1.5, "true_scale": 4.0, "negative": BAD}, {"true_guidance": 4.0}),
    "dev, true, empty": ("flux-dev", {"guidance": 3.5, "true_scale": 2.0, "negative": ""}, {"true_guidance": 2.0}),
    "schnell": ("flux-schnell", {"guidance": 1.0, "num_steps": 2}, {"guidance": 3.5}),  # a number that nobody reads
    "schnell, empty": ("flux-schnell", {"guidance": 2.0, "negative": ""}, {"guidance": 0.0, "true_guidance": 2.0}),
    "schnell, negative": (
        "flux-schnell",
        {"guidance": 4.0, "negative": BAD, "size": TALL},
        {"guidance": 0.0, "true_guidance": 4.0},
    ),
}


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def policy(tiny: Build, name: str) -> Policy:
    return our_policy(tiny(name))


@pytest.mark.parametrize("walk", WALKS)
def test_our_latents_are_those_of_the_public_pipeline(tiny: Build, public: Public, walk: str) -> None:
    """Two prompts of other lengths in a batch, within 1e-5 of the largest value, and pixels within a level."""
    name, own, theirs = WALKS[walk]
    policy, asked = our_policy(tiny(name)), {"size": WIDE, "num_steps": 4, **own}
    noise = initial_noise(2, asked["size"])
    ours = our_latents(policy, [SHORT, LONG], noise=noise, **asked)
    call = {**asked, "max_sequence_length": LENGTH, **theirs}
    call.pop("true_scale", None)
    assert apart(ours, public_latents(public(name), [SHORT, LONG], noise=noise, **call)) <= 1e-5
    pixels = public_pixels(public(name), [SHORT, LONG], noise=noise, **call)
    assert (policy.encoders.decode(ours).int() - pixels.int()).abs().max() <= 1


def test_the_shift_of_dev_follows_the_size_and_schnell_s_is_none(tiny: Build) -> None:
    first = [our_policy(tiny(name)).network.schedule(*size).levels(4)[1] for name in NAMES for size in (WIDE, LARGE)]
    assert first[0] < first[1] and first[2] == first[3] == 0.75


def test_the_size_that_is_made_unasked_is_the_pipeline_s_own(policy: Policy, public: Public, name: str) -> None:
    assert policy.network.latent_shape() == (16, 128, 128)
    assert policy.network.geometry.size == public(name).default_sample_size * public(name).vae_scale_factor == 1024


def test_latents_are_packed_as_the_pipeline_packs_them(public: Public) -> None:
    x = initial_noise(2, WIDE)
    tokens = packed(x, 2)
    assert torch.equal(tokens, public("flux-dev")._pack_latents(x, *x.shape))
    assert torch.equal(unpacked(tokens, x, 2), x)


def test_the_number_is_handed_over_as_it_is_and_none_to_schnell(policy: Policy, name: str) -> None:
    """A loss that names no guidance asks dev at the number of the run's rollouts."""
    condition = policy.encoders.encode_prompts([SHORT], LENGTH)
    with recorded(assembled(policy)) as calls:
        noise = initial_noise(1, WIDE)
        our_latents(policy, [SHORT], noise=noise, num_steps=1, guidance=1.0, size=WIDE)
        policy.network.with_module(policy.network.module).velocity(noise, torch.tensor([0.5]), condition, guidance=2.3)
        policy.network.scale = 3.5
        policy.network.velocity(noise, torch.tensor([0.5]), condition)
    policy.network.scale = 1.0
    given = [call["guidance"] for call in calls]
    if name == "flux-schnell":
        assert given == [None, None, None]
    else:
        assert torch.equal(torch.cat(given), torch.tensor([1.0, 2.3, 3.5]))


def test_a_loss_without_guidance_asks_at_the_number_of_the_rollouts(tiny: Build, tmp_path: Path) -> None:
    """NFT's policy and reference; the number is a part of the function that is sampled, and so of what is learned."""
    nft = "algorithm={type: nft, guidance_scale: 3.5, kl_beta: 1, rollout_weights: model}"
    config = load_align(write_run(tmp_path, tiny("flux-dev")), [nft]).config
    algorithm, policy = build_algorithm(config.algorithm), our_policy(tiny("flux-dev"))
    condition = policy.encoders.encode_prompts([SHORT], LENGTH)
    noise, time = initial_noise(1, WIDE), torch.tensor([0.5])
    expected = policy.network.velocity(noise, time, condition, guidance=3.5)
    roles = roles_of(config, policy.network, algorithm.needs).models
    for role in ("policy", "reference"):
        assert torch.equal(roles[role](noise, time, condition), expected)
    assert not torch.equal(policy.network.velocity(noise, time, condition, guidance=1.0), expected)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_a_stochastic_rollout_replays_bit_for_bit(policy: Policy, guidance: float) -> None:
    assert replay_difference(policy, [SHORT, SHORT, LONG, LONG], guidance) == 0


def test_a_sample_alone_has_the_bits_that_it_has_among_others(policy: Policy) -> None:
    for alone, among_others in alone_and_among_others(policy, [SHORT, LONG, "a blue ball"], 3.5):
        assert torch.equal(alone, among_others)


@pytest.mark.parametrize("kind", ["pipeline", "lora"])
def test_exports_are_loaded_by_plain_diffusers(tiny: Build, tmp_path: Path, name: str, kind: str) -> None:
    """With the latents of the trained policy; `export` compares both layouts of a LoRA before it keeps them."""
    base = tiny(name)
    asked: dict[str, Any] = {"num_steps": 4, "size": (64, 64), "noise": initial_noise(2, (64, 64)), "guidance": 1.0}
    model = {"path": str(base), "max_sequence_length": LENGTH, "lora": {"rank": 4, "alpha": 6}}
    config = run_config(base, model={**model, "height": 64, "width": 64})
    write_checkpoint(tmp_path / "run", config)
    made = export(tmp_path / "run", tmp_path / "out", kind=kind, config=config)
    assert max(made.velocity_error, made.latents_error) <= 1e-5
    assert card_class(made.path) == "FluxPipeline" and not (made.path / "pipeline.py").exists()
    ours = our_latents(open_policy(tmp_path / "run", config)[0], [SHORT, LONG], **asked)
    plain = public_pipeline(base if kind == "lora" else made.path)
    if kind == "lora":
        assert apart(public_latents(plain, [SHORT, LONG], max_sequence_length=LENGTH, **asked), ours) > 0.01
        plain.load_lora_weights(str(made.path))
    assert apart(public_latents(plain, [SHORT, LONG], max_sequence_length=LENGTH, **asked), ours) <= 1e-5


def test_a_lora_lies_on_both_kinds_of_blocks(tiny: Build) -> None:
    """On what diffusers' training adapts: in a single block the queries, keys and values alone."""
    base = tiny("flux-dev")
    config = run_config(base, model={"path": str(base), "lora": {"rank": 2}})
    write_checkpoint(base.parent / "adapted", config)
    module = open_policy(base.parent / "adapted", config)[0].network.module
    found: dict[str, set[str]] = {"transformer_blocks": set(), "single_transformer_blocks": set()}
    for parameter, value in module.named_parameters():
        if value.requires_grad:
            kind, _, layer = parameter.partition(".lora_")[0].split(".", 2)
            found[kind].add(layer)
    queries = {f"attn.{layer}" for layer in ("to_q", "to_k", "to_v")}
    text = {f"attn.{layer}" for layer in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}
    mlps = {f"{part}.net.{layer}" for part in ("ff", "ff_context") for layer in ("0.proj", "2")}
    assert found["single_transformer_blocks"] == queries
    assert found["transformer_blocks"] == queries | text | mlps | {"attn.to_out.0"}


def test_an_iteration_of_flow_grpo_ends_in_an_export(tiny: Build, tmp_path: Path) -> None:
    path, made = write_run(tmp_path, tiny("flux-dev")), tmp_path / "runs" / "once"
    flowalign("align", path, "algorithm.guidance_scale=3.5")
    row = read_metrics(made / "metrics.jsonl")[-1]
    assert row["iteration"] == 1 and row["replay/max_abs_dlogp"] == 0 and row["learner/updates"] == 1
    flowalign("export", made, "--to", tmp_path / "lora", "--as", "lora")
    assert card_class(tmp_path / "lora") == "FluxPipeline"
    public_pipeline(tiny("flux-dev")).load_lora_weights(str(tmp_path / "lora"))


def meta_parameters(transformer: Any) -> dict[str, int]:
    """Count the parameters of the classes, with what the files of the published model state beside their defaults."""
    clip: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072}
    clip |= {"num_attention_heads": 12, "num_hidden_layers": 12}
    t5: dict[str, Any] = {"vocab_size": 32128, "d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 24}
    vae: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
    vae |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {
            "transformer": FluxTransformer2DModel(**transformer),
            "vae": AutoencoderKL(**vae, use_quant_conv=False, use_post_quant_conv=False),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**clip)),
            "text_encoder_2": T5EncoderModel(T5Config(**t5, feed_forward_proj="gated-gelu")),
        }
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


@pytest.mark.parametrize(
    ("model", "count", "passes"), [("FLUX.1-dev", 11_901_408_320, 20), ("FLUX.1-schnell", 11_891_178_560, 40)]
)
def test_a_published_model_is_planned_without_its_files(model: str, count: int, passes: int) -> None:
    """Its files hold two bytes a parameter, and headers. Of ten steps of two images at 3.5 dev, which takes the number,
    makes 20 calls; schnell makes two of each."""
    config = AlignConfig.model_validate(
        {
            "name": "x",
            "iterations": 1,
            "model": {"path": f"absent/{model}", "max_sequence_length": 512},
            "data": {"groups_per_iteration": 1},
            "algorithm": {"type": "flow_grpo", "group_size": 2, "num_steps": 10, "guidance_scale": 3.5},
            "rewards": ["clip"],
        }
    )
    plan = make_plan(config)
    sizes, published = plan.model, flux.FAMILY.published[model.lower()]
    assert sizes.transformer == count
    assert meta_parameters(published.parts["transformer"]) == {"transformer": count, **sizes.frozen}
    assert (sizes.num_layers, sizes.width, sizes.image_tokens, sizes.text_tokens) == (57, 3072, 4096, 512)
    assert published.file_bytes is not None
    assert 0 < published.file_bytes - 2 * (count + sum(sizes.frozen.values())) < 1_000_000
    assert model in sizes.source and "33.7 GB" in sizes.source and plan.geometry.rollout_passes == passes
