"""The architectures: what they compute, what they cost, and that they are the same kind of network."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from flowalign.config.sections import Architecture, TransformerConfig
from flowalign.models.activation_checkpointing import checkpoint_activations
from flowalign.models.families.sd3 import FAMILY
from flowalign.models.families.sd3.dit import ConcatBlock
from flowalign.models.families.sd3.fresh import CLASSES, flops, matching, new_transformer, spec_flops
from flowalign.models.inputs import add_inputs, inputs_of, pooled_with_inputs

LIKE = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 6,
}
ARCHITECTURES = get_args(Architecture)


def random_network(architecture: Architecture, *, num_layers: int = 2, **changes: Any):
    """A network whose weights have all moved away from their zeros."""
    network = new_transformer(
        LIKE, TransformerConfig(architecture=architecture, num_layers=num_layers, num_heads=1, **changes)
    ).eval()
    random = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    return network.requires_grad_(False)


def tensors(count: int = 3, side: int = 8) -> dict[str, Any]:
    random = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(count, 4, side, side, generator=random),
        "encoder_hidden_states": torch.randn(count, 5, 24, generator=random),
        "pooled_projections": torch.randn(count, 20, generator=random),
        "timestep": torch.linspace(100, 900, count),
        "return_dict": False,
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_new_network_answers_zero_in_the_shape_of_its_latents(architecture):
    network = new_transformer(LIKE, TransformerConfig(architecture=architecture, num_layers=2, num_heads=1))
    answer = network(**tensors())[0]
    assert answer.shape == (3, 4, 8, 8) and not answer.any()
    assert network.config["num_layers"] == 2 and len(network.transformer_blocks) == 2
    assert all(network.config[name] == value for name, value in LIKE.items())
    assert (
        new_transformer(LIKE, TransformerConfig(architecture=architecture, num_layers=3)).config["num_attention_heads"]
        == 3
    )


@pytest.mark.parametrize("architecture", ["concat", "cross", "uvit"])
def test_every_block_of_a_new_network_is_the_identity(architecture):
    network = new_transformer(LIKE, TransformerConfig(architecture=architecture, num_layers=1, num_heads=1))
    image, text, temb = torch.randn(2, 4, 64), torch.randn(2, 3, 64), torch.randn(2, 64)
    text_out, image_out = network.transformer_blocks[0](image, text, temb)
    assert torch.equal(image_out, image) and torch.equal(text_out, text)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5])
def test_each_block_of_a_uvits_second_half_takes_what_its_mirror_image_kept(num_layers):
    """The same by hand, with a list of skips, from the network's own parts."""
    network: Any = random_network("uvit", num_layers=num_layers)
    inputs = tensors()
    blocks, half = network.transformer_blocks, num_layers // 2
    assert [block.skip is not None for block in blocks] == [i >= num_layers - half for i in range(num_layers)]
    image = network.pos_embed(inputs["hidden_states"])
    text = network.context_embedder(inputs["encoder_hidden_states"])
    temb = network.time_text_embed(inputs["timestep"], inputs["pooled_projections"])
    x, kept = torch.cat([text, image], 1), []
    for index, block in enumerate(blocks):
        if block.skip is not None:
            x = block.skip(torch.cat([x, kept.pop()], -1))
        text, image = ConcatBlock.forward(block, x[:, 5:], x[:, :5], temb)
        x = torch.cat([text, image], 1)
        if index < half:
            kept.append(x)
    patches = network.proj_out(network.norm_out(x[:, 5:], temb)).reshape(3, 4, 4, 2, 2, 4)
    expected = torch.einsum("nhwpqc->nchpwq", patches).reshape(3, 4, 8, 8)
    torch.testing.assert_close(network(**inputs)[0], expected)


def test_a_new_uvit_is_the_identity_through_its_skips():
    network = new_transformer(LIKE, TransformerConfig(architecture="uvit", num_layers=3, num_heads=1))
    image, text, temb = torch.randn(2, 4, 64), torch.randn(2, 3, 64), torch.randn(2, 64)
    found, words = image, text
    for block in network.transformer_blocks:
        words, found = block(found, words, temb)
    assert torch.equal(found, image) and torch.equal(words, text)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_are_those_of_the_seed(architecture):
    one, same, other = (
        new_transformer(LIKE, TransformerConfig(architecture=architecture, num_layers=1, num_heads=1, seed=s))
        for s in (3, 3, 4)
    )
    assert torch.equal(one.context_embedder.weight, same.context_embedder.weight)
    assert not torch.equal(one.context_embedder.weight, other.context_embedder.weight)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_text_pooled_text_and_time_matter_and_the_order_of_text_tokens_does_not(architecture):
    network, inputs = random_network(architecture), tensors()
    answer = network(**inputs)[0]
    for name in ("encoder_hidden_states", "pooled_projections", "timestep"):
        assert not torch.allclose(network(**{**inputs, name: inputs[name] * 0.5})[0], answer, atol=1e-4)
    swapped = inputs["encoder_hidden_states"].flip(1)
    torch.testing.assert_close(network(**{**inputs, "encoder_hidden_states": swapped})[0], answer)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_samples_are_independent_and_patches_are_not_interchangeable(architecture):
    network, inputs = random_network(architecture), tensors()
    answer = network(**inputs)[0]
    alone = {name: value[1:2] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    torch.testing.assert_close(network(**alone)[0], answer[1:2])
    turned = network(**{**inputs, "hidden_states": inputs["hidden_states"].roll(4, -1)})[0]
    assert not torch.allclose(turned.roll(-4, -1), answer, atol=1e-4)


def test_only_the_concatenating_one_lets_the_image_change_the_text():
    image, text, temb = torch.randn(1, 4, 64), torch.randn(1, 3, 64), torch.randn(1, 64)
    expected: dict[Architecture, bool] = {"concat": True, "cross": False, "uvit": True}
    for architecture, changes in expected.items():
        block = random_network(architecture).transformer_blocks[0]
        assert torch.equal(block(image, text, temb)[0], block(2 * image + 1, text, temb)[0]) != changes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_qk_norm_there_are_no_norm_weights(architecture):
    names = {True: set(), False: set()}
    for qk_norm in names:
        network = random_network(architecture, qk_norm=qk_norm)
        names[qk_norm] = {name for name in network.state_dict() if ".norm_q." in name or ".norm_k." in name}
        assert network(**tensors())[0].isfinite().all()
    assert names[True] and not names[False]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_network_computes_the_same_when_loaded(architecture, tmp_path):
    network = random_network(architecture)
    network.save_pretrained(tmp_path)
    loaded = CLASSES[architecture].from_pretrained(tmp_path)
    assert type(loaded) is type(network) and torch.equal(loaded(**tensors())[0], network(**tensors())[0])


def test_a_pipeline_with_a_baseline_loads_as_one(tiny_pipeline_dir, tmp_path):
    absent: Any = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline_dir, **absent)
    network = new_transformer(
        pipeline.transformer.config, TransformerConfig(architecture="concat", num_layers=1, num_heads=1)
    )
    parts = {**pipeline.components, "transformer": network, "scheduler": FlowMatchEulerDiscreteScheduler()}
    StableDiffusion3Pipeline(**parts).save_pretrained(tmp_path)
    loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path, **absent).transformer
    assert type(loaded) is type(network)
    assert torch.equal(loaded.context_embedder.weight, network.context_embedder.weight)


@pytest.mark.parametrize("architecture", ["concat", "cross", "uvit"])
def test_baselines_take_loras_inputs_and_gradient_checkpoints(architecture):
    from peft import LoraConfig

    network, inputs = random_network(architecture), tensors()
    answer = network(**inputs)[0]
    network.add_adapter(LoraConfig(r=2, target_modules=list(FAMILY.lora_targets)))
    add_inputs(network, ["r"])
    pooled = pooled_with_inputs(inputs["pooled_projections"], inputs["timestep"] / 1000, names=inputs_of(network))
    network.enable_gradient_checkpointing()
    again = network(**{**inputs, "pooled_projections": pooled})[0]
    torch.testing.assert_close(again, answer)
    again.square().mean().backward()
    gradients = [p.grad for name, p in network.named_parameters() if "lora_B" in name]
    assert gradients and all(gradient is not None and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("how", ["blocks", "selective"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_that_are_computed_anew_change_no_bit(architecture, how):
    found = []
    for way in ("none", how):
        network = random_network(architecture, num_layers=3).requires_grad_(True)
        checkpoint_activations(network, way)
        answer = network(**tensors())[0]
        answer.square().mean().backward()
        found.append([answer, *(p.grad for p in network.parameters() if p.grad is not None)])
    assert len(found[0]) > 30 and all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("num_layers", "num_heads", "image", "text"), [(1, 1, 16, 5), (3, 2, 7, 11)])
def test_the_closed_form_counts_the_flops_that_torch_counts(architecture, num_layers, num_heads, image, text):
    spec = TransformerConfig(architecture=architecture, num_layers=num_layers, num_heads=num_heads)
    assert spec_flops(LIKE, spec, image, text) == flops(new_transformer(LIKE, spec), image, text)


def test_flops_count_the_inputs_of_a_network():
    network = new_transformer(LIKE, TransformerConfig(architecture="mmdit", num_layers=1, num_heads=1))
    before = flops(network, 16, 5)
    add_inputs(network, ["r"])
    assert flops(network, 16, 5) - before == 2 * (256 * 64 + 64 * 64)


@pytest.mark.parametrize("architecture", ["concat", "cross", "uvit"])
def test_a_matching_network_costs_and_looks_nearly_the_same(architecture):
    spec = TransformerConfig(architecture="mmdit", num_layers=12, seed=5)
    found = matching(LIKE, spec, architecture, 256, 100)
    assert spec_flops(LIKE, found, 256, 100) == pytest.approx(spec_flops(LIKE, spec, 256, 100), rel=0.02)
    assert 0.5 <= found.num_layers / found.heads <= 2 and found.architecture == architecture
    assert found.model_copy(update={"architecture": "mmdit", "num_layers": 12, "num_heads": None}) == spec


def test_a_small_match_keeps_its_shape_rather_than_cost_the_same():
    like = {**LIKE, "in_channels": 16, "out_channels": 16, "joint_attention_dim": 192, "pooled_projection_dim": 192}
    found = matching(like, TransformerConfig(architecture="mmdit", num_layers=4, num_heads=3), "concat", 16, 20)
    assert (found.num_layers, found.heads) == (4, 3)


def test_an_architecture_matches_itself():
    spec = TransformerConfig(architecture="mmdit", num_layers=5, num_heads=3)
    assert matching(LIKE, spec, "mmdit", 64, 20) == spec
