"""Linear layers of a frozen base that are stored smaller: what they compute, keep, and let a LoRA learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from flowalign.config.sections import LoraConfig, ModelConfig
from flowalign.flow.randomness import seeded
from flowalign.models.build import count_parameters, load_network, load_policy
from flowalign.models.guided import guided
from flowalign.models.stored_linear import StoredLinear, quantized, restored, stored_values

FACTORS = LoraConfig(rank=2, alpha=4)


def layer(bias: bool = True) -> nn.Linear:
    made = nn.Linear(24, 40, bias=bias)
    for parameter in made.parameters():
        nn.init.normal_(parameter, generator=seeded(1))
    return made.requires_grad_(False)


def test_eight_bits_are_the_nearest_of_127_levels_each_way() -> None:
    weight = torch.tensor([[1.0, -2.54, 0.011, 0.0], [0.0, 0.0, 0.0, 0.0], [1e-3, -1e-3, 5e-4, 2.54e-3]])
    numbers, scale = quantized(weight)
    assert numbers.tolist() == [[50, -127, 1, 0], [0, 0, 0, 0], [50, -50, 25, 127]]
    torch.testing.assert_close(scale, torch.tensor([[0.02], [0.0], [2e-5]]), atol=1e-30, rtol=1e-6)
    assert ((restored(numbers, scale, torch.float32) - weight).abs() <= scale / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_it_computes_and_differentiates_as_a_layer_of_the_restored_weight(
    dtype: torch.dtype, bias: bool, autocast: bool
) -> None:
    stored, plain = StoredLinear(layer(bias), dtype), layer(bias)
    plain.weight.data = restored(stored.weight, stored.scale, torch.float32)
    found = []
    for module in (stored, plain):
        x = torch.randn(3, 5, 24, generator=seeded(2), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        y.float().square().sum().backward()
        assert x.grad is not None
        found.append((y, x.grad))
    assert found[0][0].dtype == (torch.bfloat16 if autocast else torch.float32)
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=2e-2 if autocast else 1e-6, atol=1e-5)


def test_nothing_but_the_stored_weight_is_kept_for_the_backward_pass() -> None:
    stored, kept = StoredLinear(layer(), torch.int8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        stored(torch.randn(3, 24, requires_grad=True))
    assert sum(t.numel() * t.element_size() for t in kept) == 24 * 40 + 4 * 40


def test_a_derivative_forward_is_the_product_with_the_tangent() -> None:
    stored = StoredLinear(layer(), torch.int8)
    x, tangent = torch.randn(3, 24), torch.randn(3, 24)
    made, derivative, *_ = torch.func.jvp(stored, (x,), (tangent,))
    assert torch.equal(made, stored(x))
    torch.testing.assert_close(derivative, tangent @ restored(stored.weight, stored.scale, torch.float32).t())


def velocity(directory: Path, **model: Any) -> tuple[Tensor, nn.Module]:
    own = ModelConfig(path=str(directory), max_sequence_length=16, lora=FACTORS, **model)
    policy = load_policy(own)
    for name, parameter in policy.network.module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05, generator=seeded(3))
    condition = policy.encoders.encode_prompts(["a photo of a red circle"] * 2, 16)
    x = torch.randn(2, *policy.network.latent_shape(), generator=seeded(4))
    made = guided(policy.network)(x, torch.full((2,), 0.6), condition)
    made.square().mean().backward()
    return made.detach(), policy.network.module


def test_blocks_of_a_model_are_stored_and_a_lora_on_them_learns(tiny_pipeline_dir: Path) -> None:
    plain, whole = velocity(tiny_pipeline_dir)
    eight, network = velocity(tiny_pipeline_dir, base_dtype="int8")
    assert 0 < float((eight - plain).norm() / plain.norm()) < 0.02
    assert count_parameters(network) == count_parameters(whole)
    blocks = sum(m.weight.numel() for m in whole.transformer_blocks.modules() if type(m) is nn.Linear)  # type: ignore[union-attr]
    assert stored_values(network) == blocks - sum(p.numel() for p in whole.parameters() if p.requires_grad)
    own, compared = dict(network.named_parameters()), 0
    for name, parameter in whole.named_parameters():
        gradient, expected = own[name].grad if name in own else None, parameter.grad
        if expected is not None and expected.any():  # the last block's texts lead nowhere
            assert gradient is not None and gradient.dtype == torch.float32
            assert float((gradient - expected).norm() / expected.norm()) < 0.1
            compared += 1
    assert compared > 10


def test_bfloat16_loses_nothing_of_weights_that_are_bfloat16(tiny_pipeline_dir: Path) -> None:
    plain, whole = velocity(tiny_pipeline_dir)
    half, network = velocity(tiny_pipeline_dir, base_dtype="bfloat16")
    assert stored_values(network) and not stored_values(whole)
    for name, part in network.named_modules():
        if isinstance(part, StoredLinear):
            assert torch.equal(part.weight, whole.get_submodule(name).weight.bfloat16())  # type: ignore[union-attr]
    assert float((half - plain).norm() / plain.norm()) < 0.005


def test_a_float32_base_computes_in_bfloat16(tiny_pipeline_dir: Path) -> None:
    own = ModelConfig(path=str(tiny_pipeline_dir), dtype="bfloat16", base_dtype="float32", lora=FACTORS)
    network = load_network(own)
    assert network.mixed and {p.dtype for p in network.module.parameters()} == {torch.float32}


def test_a_base_is_of_a_lora_alone() -> None:
    with pytest.raises(ValidationError, match=r"base_dtype: int8 is of what a LoRA leaves frozen, and all weights"):
        ModelConfig(base_dtype="int8")
