"""Extra inputs of a network: what a fresh one leaves alone, what learns, and where its weights go."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowalign.models.errors import ModelError
from flowalign.models.families.sd3 import FAMILY
from flowalign.models.inputs import PREFIX, add_inputs, inputs_of, pooled_with_inputs, restore_inputs
from flowalign.shapes.build.pipeline import new_transformer

BOTH = ("r", "guidance")


@pytest.fixture
def network() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return new_transformer(128, 128, num_layers=2, num_heads=1).eval()


def tensors(count: int = 3) -> tuple[torch.Tensor, ...]:
    """Latents, times, tokens and pooled text."""
    random = torch.Generator().manual_seed(1)
    shapes = (count, 16, 8, 8), (count, 5, 128), (count, 128)
    x, tokens, pooled = (torch.randn(shape, generator=random) for shape in shapes)
    return x, torch.linspace(0.3, 0.9, count), tokens, pooled


def run(network, x, t, tokens, pooled, r=None, guidance=None) -> torch.Tensor:
    pooled = pooled_with_inputs(pooled, t, r, guidance, inputs_of(network))
    return network(x, tokens, pooled, t * 1000, return_dict=False)[0]


def taught(network) -> SD3Transformer2DModel:
    """The network with inputs that do something."""
    add_inputs(network, BOTH)
    random = torch.Generator().manual_seed(2)
    for parameter in network.time_text_embed.inputs.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
    return network


def test_fresh_inputs_change_nothing_whatever_their_values(network):
    before = run(network, *tensors())
    add_inputs(network, BOTH)
    after = run(network, *tensors(), r=torch.tensor([0.0, 0.2, 0.5]), guidance=4.0)
    assert torch.equal(before, after)


def test_old_names_stay_and_new_ones_are_those_of_their_input(network):
    before = set(network.state_dict())
    add_inputs(network, ("guidance", "r"))
    new = set(network.state_dict()) - before
    assert before <= set(network.state_dict())
    assert new == {f"{PREFIX}{i}.linear_{n}.{w}" for i in BOTH for n in (1, 2) for w in ("weight", "bias")}
    assert inputs_of(network) == BOTH and network.config["extra_inputs"] == ["r", "guidance"]


def test_inputs_added_one_by_one_are_those_added_together(network):
    other = copy.deepcopy(network)
    add_inputs(network, BOTH)
    add_inputs(other, ["guidance"])
    taught_weight = other.time_text_embed.inputs["guidance"].linear_2.weight.data.fill_(1.0)
    add_inputs(other, BOTH)
    assert torch.equal(other.time_text_embed.inputs["guidance"].linear_2.weight, taught_weight)
    for name, value in network.time_text_embed.inputs["r"].state_dict().items():
        assert torch.equal(value, other.time_text_embed.inputs["r"].state_dict()[name])
    assert inputs_of(other) == BOTH


def test_gradient_reaches_the_last_layer_at_once_and_all_after_one_step(network):
    add_inputs(network, BOTH)
    inputs = network.time_text_embed.inputs
    optimizer = torch.optim.SGD(inputs.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        run(network, *tensors(), r=torch.zeros(3), guidance=4.0).square().mean().backward()
        for name, parameter in inputs.named_parameters():
            assert (parameter.grad.abs().max() > 0) == (step == 1 or "linear_2" in name)
        optimizer.step()


def test_taught_inputs_matter_and_only_away_from_their_defaults(network):
    taught(network)
    plain = run(network, *tensors())
    x, t, tokens, pooled = tensors()
    assert torch.equal(run(network, x, t, tokens, pooled, r=t, guidance=1.0), plain)
    assert not torch.allclose(run(network, x, t, tokens, pooled, r=0.5 * t), plain)
    assert not torch.allclose(run(network, x, t, tokens, pooled, guidance=2.0), plain)
    per_sample = run(network, x, t, tokens, pooled, guidance=torch.tensor([1.0, 2.0, 2.0]))
    torch.testing.assert_close(per_sample[0], plain[0])
    torch.testing.assert_close(per_sample[1:], run(network, x, t, tokens, pooled, guidance=2.0)[1:])


def test_columns_are_offsets_from_the_plain_network():
    _, t, _, pooled = tensors()
    made = pooled_with_inputs(pooled, t, torch.zeros(3), 7.5, BOTH)
    torch.testing.assert_close(made[:, 128:], torch.stack([t, torch.full((3,), 6.5)], 1))
    assert torch.equal(made[:, :128], pooled)
    assert not pooled_with_inputs(pooled, t, names=BOTH)[:, 128:].any()


def test_columns_keep_their_precision_beside_a_half_precision_text(network):
    taught(network).bfloat16()
    _, t, _, pooled = tensors()
    made = pooled_with_inputs(pooled.bfloat16(), t, t - 0.001, None, inputs_of(network))
    assert made.dtype == torch.float32
    torch.testing.assert_close(made[:, 128], torch.full((3,), 0.001), rtol=1e-4, atol=0)
    assert network.time_text_embed(t * 1000, made).dtype == torch.bfloat16


def test_jvp_in_time_is_the_finite_difference_of_the_network(network):
    taught(network).double()
    x, t, tokens, pooled = (value.double() for value in tensors())
    direction, r = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64), 0.5 * t

    def u(x, t):
        return run(network, x, t, tokens, pooled, r=r)

    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        # diffusers' sinusoids are float32, so a difference of 1e-3 is as small as it gets.
        step = 1e-3
        value, slope = torch.func.jvp(u, (x, t), (direction, torch.ones_like(t)))[:2]
        ahead, behind = u(x + step * direction, t + step), u(x - step * direction, t - step)
        frozen = torch.func.jvp(u, (x, t), (direction, torch.zeros_like(t)))[1]
    torch.testing.assert_close(value, u(x, t))
    difference = (ahead - behind) / (2 * step)
    assert torch.nn.functional.cosine_similarity(slope.flatten(), difference.flatten(), 0) > 0.9
    assert not torch.allclose(slope, frozen)


def test_a_saved_transformer_gets_its_inputs_back(network, tmp_path):
    taught(network).save_pretrained(tmp_path)
    expected = run(network, *tensors(), r=torch.zeros(3), guidance=3.0)
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path)
    assert inputs_of(loaded) == () and loaded.config["extra_inputs"] == ["r", "guidance"]
    restore_inputs(loaded, tmp_path)
    assert torch.equal(run(loaded, *tensors(), r=torch.zeros(3), guidance=3.0), expected)
    fresh = new_transformer(128, 128, num_layers=2, num_heads=1)
    add_inputs(fresh, BOTH)
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(run(fresh, *tensors(), r=torch.zeros(3), guidance=3.0), expected)


def test_listed_inputs_without_weights_are_refused(network, tmp_path):
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "extra_inputs": ["r"]}))
    with pytest.raises(ModelError, match=r"no weights time_text_embed\.inputs\.r"):
        restore_inputs(SD3Transformer2DModel.from_pretrained(tmp_path), tmp_path)


def test_a_deep_copy_has_weights_of_its_own(network):
    other = copy.deepcopy(taught(network))
    expected = run(other, *tensors(), guidance=2.0)
    network.time_text_embed.inputs["guidance"].linear_2.bias.data += 1
    assert torch.equal(run(other, *tensors(), guidance=2.0), expected)
    assert not torch.allclose(run(network, *tensors(), guidance=2.0), expected)


def test_inputs_and_a_lora_go_together_in_either_order(network):
    other = copy.deepcopy(network)
    lora = LoraConfig(r=2, init_lora_weights="gaussian", target_modules=list(FAMILY.lora_targets))
    taught(network).add_adapter(lora)
    other.add_adapter(lora)
    taught(other)
    values = {"r": torch.zeros(3), "guidance": 2.0}
    torch.testing.assert_close(run(network, *tensors(), **values), run(other, *tensors(), **values))
    trainable = {name for name, p in other.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith(PREFIX) for name in trainable)
    assert sum(name.startswith(PREFIX) for name in trainable) == 8


def test_the_compiler_traces_inputs_without_a_break(network):
    taught(network)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    x, t, tokens, pooled = tensors()
    expected = run(network, x, t, tokens, pooled, torch.zeros(3), 2.0)
    torch.testing.assert_close(run(compiled, x, t, tokens, pooled, torch.zeros(3), 2.0), expected)


def test_wrong_inputs_are_refused_by_name(network):
    with pytest.raises(ModelError, match="unknown input 's'"):
        add_inputs(network, ["s"])
    with pytest.raises(ModelError, match="no second time r"):
        pooled_with_inputs(torch.zeros(1, 4), torch.ones(1), torch.zeros(1), names=("guidance",))
    with pytest.raises(ModelError, match="Linear has no embedding"):
        add_inputs(torch.nn.Linear(1, 1), ["r"])
