"""What is FLUX.1's own: a number that the network takes, packed latents, two kinds of blocks, a shift by size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.algorithms import build_algorithm
from flowalign.config.sections import ModelConfig
from flowalign.config.training import PretrainConfig
from flowalign.export.verify import amplification
from flowalign.intake.file import load_align
from flowalign.models.base import Policy
from flowalign.models.loading import assembled
from flowalign.models.packing import packed, unpacked
from flowalign.models.textlength import prompt_note
from flowalign.run.roles import roles_of
from flowalign.samples.opened import open_policy
from tests.families.ours import LENGTH, our_latents, our_policy, write_run
from tests.families.public import initial_noise, recorded
from tests.tiny import run_config, write_checkpoint

Build = Callable[..., Path]
Public = Callable[..., Any]
NAMES = ("flux-dev", "flux-schnell")
SHORT = "a red cube"
WIDE, LARGE = (64, 96), (192, 128)


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def policy(tiny: Build, name: str) -> Policy:
    return our_policy(tiny(name))


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
    unguided = policy.network.velocity(noise, time, condition, guidance=1.0)
    roles = roles_of(config, policy.network, algorithm.needs).models
    for role in ("policy", "reference"):  # a copy's weights lie elsewhere, and on some processors round otherwise there
        error = (roles[role](noise, time, condition) - expected).abs().max()
        assert error <= 1e-2 * (unguided - expected).abs().max()


def test_a_training_on_latents_asks_at_its_own_number(tiny: Build) -> None:
    """diffusers' training script hands FLUX.1 dev a 3.5 unless it is told otherwise."""
    content: dict[str, Any] = {"name": "mine", "iterations": 4, "latents": "bank", "learner": {"dtype": "float32"}}
    content["model"] = {"path": str(tiny("flux-dev"))}
    content["algorithm"] = {"type": "rectified_flow", "guidance_scale": 3.5}
    config, policy = PretrainConfig.model_validate(content), our_policy(tiny("flux-dev"))
    condition = policy.encoders.encode_prompts([SHORT], LENGTH)
    noise, time = initial_noise(1, WIDE), torch.tensor([0.5])
    expected = policy.network.velocity(noise, time, condition, guidance=3.5)
    assert not torch.allclose(policy.network.velocity(noise, time, condition), expected)
    needs = build_algorithm(config.algorithm).needs
    assert torch.equal(roles_of(config, policy.network, needs).models["policy"](noise, time, condition), expected)


def test_guidance_that_is_an_input_excuses_no_rounding() -> None:
    """Two passes at guidance 3 magnify rounding by 3 + 2, and by 1 where there is one."""
    assert [amplification(3.0, passes=passes) for passes in (False, True)] == [1, 5]
    assert amplification(1.0, passes=True) == 1


def test_what_clip_does_not_read_is_said_to_be_for_t5_alone(tiny: Build) -> None:
    said = "1 is longer than the 77 tokens that CLIP reads; the rest of it is for T5 alone"
    assert prompt_note(ModelConfig(path=str(tiny("flux-dev"))), [SHORT, "a photo of a dog " * 20]) == said


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
