"""A network that skips its blocks: what is exact, what is counted, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig

from flowalign.config.sections import TransformerConfig
from flowalign.flow.caching import fit, relative_l1
from flowalign.models.errors import ModelError
from flowalign.models.families.sd3 import FAMILY
from flowalign.models.families.sd3.fresh import CLASSES, new_transformer
from flowalign.models.teacache import BlockCache, Distances

LIKE = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 6,
}
STEPS = 6
NEVER_AGAIN = 1e9  # a threshold that no trajectory reaches


def random_network(architecture: str = "mmdit", seed: int = 1) -> Any:
    network = new_transformer(LIKE, TransformerConfig(architecture=architecture, num_layers=3, num_heads=1)).eval()  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    return network


@torch.no_grad()
def call(network, x, time: float) -> torch.Tensor:
    random = torch.Generator().manual_seed(3)
    rows = len(x)
    tokens, pooled = torch.randn(4, 5, 24, generator=random), torch.randn(4, 20, generator=random)
    times = torch.full((rows,), time * 1000)
    return network(x, tokens[:rows], pooled[:rows], times, return_dict=False)[0]


def walk(network, cache: BlockCache | None = None, x: torch.Tensor | None = None, steps: int = STEPS):
    """The states of an Euler walk."""
    x = start() if x is None else x
    states = [x]
    for step in range(steps):
        x = x - call(network, x, 1 - step / steps) / steps
        states.append(x)
    return torch.stack(states)


def start(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("architecture", list(CLASSES))
def test_threshold_zero_computes_every_step_bit_for_bit(architecture):
    network = random_network(architecture)
    expected = walk(network)
    with BlockCache(network, STEPS, 0.0) as cache:
        assert torch.equal(walk(network), expected)
    assert (cache.computed, cache.reused) == (4 * STEPS, 0)


@pytest.mark.parametrize("architecture", list(CLASSES))
def test_a_huge_threshold_computes_the_first_and_the_last_step_alone(architecture):
    network = random_network(architecture)
    calls = []
    handle = network.transformer_blocks[1].ff.register_forward_hook(lambda *args: calls.append(len(args[2])))
    expected = walk(network)
    calls.clear()
    with BlockCache(network, STEPS, NEVER_AGAIN) as cache:
        states = walk(network)
    handle.remove()
    assert calls == [4, 4] and (cache.computed, cache.reused) == (8, 4 * (STEPS - 2))
    assert torch.equal(states[1], expected[1]) and not torch.equal(states[2], expected[2])


@pytest.mark.parametrize("architecture", list(CLASSES))
def test_a_repeated_input_reuses_its_own_output(architecture):
    network = random_network(architecture)
    expected = call(network, start(), 0.7)
    with BlockCache(network, STEPS, NEVER_AGAIN) as cache:
        for _ in range(STEPS - 1):
            torch.testing.assert_close(call(network, start(), 0.7), expected, atol=1e-6, rtol=1e-5)
    assert cache.reused == 4 * (STEPS - 2)


def test_a_reused_step_is_the_stored_change_under_the_last_layers_of_its_own_time():
    network, x = random_network(), start()
    later = 0.9 * x + 0.1 * start(seed=5)
    kept = {}

    def keep(module, args, kwargs):
        kept["temb"], kept["hidden"] = kwargs["temb"], kwargs["hidden_states"]

    first = network.transformer_blocks[0].register_forward_pre_hook(keep, with_kwargs=True)
    last = network.transformer_blocks[-1].register_forward_hook(lambda m, a, out: kept.update(out=out[1]))
    with BlockCache(network, STEPS, NEVER_AGAIN):
        call(network, x, 0.7)
        change = kept["out"] - kept["hidden"]
        reused = call(network, later, 0.6)
    first.remove()
    last.remove()
    with torch.no_grad():
        tokens = network.proj_out(network.norm_out(network.pos_embed(later) + change, kept["temb"]))
    patches = tokens.view(4, 4, 4, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(4, 4, 8, 8)
    torch.testing.assert_close(reused, patches)


def test_samples_decide_on_their_own_and_only_those_that_compute_run():
    network = random_network()
    still, moving = start(1), [start(1, seed) for seed in range(10, 10 + STEPS)]
    with BlockCache(network, STEPS, 0.5) as cache:
        mixed = torch.stack([call(network, torch.cat([still, x]), 0.7) for x in moving])
    assert (cache.computed, cache.reused) == (2 + STEPS, STEPS - 2)
    full = torch.stack([call(network, torch.cat([still, x]), 0.7) for x in moving])
    torch.testing.assert_close(mixed, full)


def test_a_sample_does_not_depend_on_its_batch():
    network = random_network()
    with BlockCache(network, 12, 0.1) as cache:
        together = walk(network, x=start(), steps=12)[-1]
        assert cache.computed and cache.reused
        for row in (0, 1):
            cache.reset()
            alone = walk(network, x=start()[: row + 1], steps=12)[-1]
            torch.testing.assert_close(alone[row], together[row])


def test_a_reset_makes_trajectories_independent():
    network = random_network()
    with BlockCache(network, STEPS, 0.3) as cache:
        fresh = walk(network)
    with BlockCache(network, STEPS, 0.3) as cache:
        walk(network, x=start(seed=9))
        cache.reset()
        assert torch.equal(walk(network), fresh)
        with pytest.raises(RuntimeError, match="one for each trajectory"):
            walk(network)


def test_a_smaller_threshold_computes_more_and_errs_less():
    network = random_network()
    expected = walk(network, steps=20)[-1]
    errors, computed = [], []
    for threshold in (0.02, 0.2, NEVER_AGAIN):
        with BlockCache(network, 20, threshold) as cache:
            errors.append(float((walk(network, steps=20)[-1] - expected).abs().mean()))
        computed.append(cache.computed)
    assert errors == sorted(errors) and errors[0] < errors[-1]
    assert computed == sorted(computed, reverse=True) and computed[0] > computed[-1]


def test_a_lora_is_part_of_what_is_cached():
    network = random_network()
    network.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=list(FAMILY.lora_targets)))
    with_lora = walk(network)
    with BlockCache(network, STEPS, 0.0):
        assert torch.equal(walk(network), with_lora)
    network.disable_adapters()
    assert not torch.allclose(walk(network), with_lora)


def test_a_network_is_itself_again_afterwards():
    network = random_network()
    names, expected = list(network.state_dict()), walk(network)
    with pytest.raises(ZeroDivisionError), BlockCache(network, STEPS, NEVER_AGAIN):
        walk(network)
        raise ZeroDivisionError
    assert list(network.state_dict()) == names and torch.equal(walk(network), expected)


def test_distances_are_those_of_full_runs_and_can_be_fitted():
    network = random_network()
    with Distances(network) as distances:
        states = walk(network, steps=12)
        distances.reset()
        walk(network, x=start(seed=4), steps=12)
    assert len(distances.inputs) == len(distances.outputs) == 22
    outputs = [call(network, states[step], 1 - step / 12) for step in (0, 1)]
    torch.testing.assert_close(distances.outputs[0], relative_l1(outputs[1], outputs[0]))
    polynomial = fit(torch.cat(distances.inputs), torch.cat(distances.outputs), degree=1)
    with BlockCache(network, 12, 0.2, polynomial) as cache:
        walk(network, steps=12)
    assert cache.computed and not network.transformer_blocks[0].norm1._forward_hooks


def test_gradients_other_shapes_and_other_networks_are_refused():
    network = random_network()
    with BlockCache(network, STEPS, 0.0) as cache:
        with pytest.raises(ModelError, match="no gradient"):
            network(start(), torch.zeros(4, 5, 24), torch.zeros(4, 20), torch.ones(4))
        call(network, start(), 1.0)
        with pytest.raises(ModelError, match="call reset"):
            call(network, start(2), 0.9)
        with pytest.raises(ModelError, match="being cached already"), BlockCache(network, STEPS, 0.0):
            pass
        cache.reset()
        call(network, start(2), 0.9)
    with pytest.raises(ModelError, match="no transformer blocks"), BlockCache(torch.nn.Linear(1, 1), STEPS, 0.0):
        pass
