"""Activations that are computed anew change no bit of any family's learning, and take less memory meanwhile."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowalign.algorithm import LossOutput
from flowalign.config.sections import LoraConfig, ModelConfig
from flowalign.config.updates import ActivationCheckpointing
from flowalign.engine.build import build_engine
from flowalign.models.activation_checkpointing import checkpoint_activations
from flowalign.models.base import Policy
from flowalign.models.build import load_policy
from flowalign.models.errors import ModelError
from flowalign.models.guided import guided
from flowalign.models.network import Network
from flowalign.record.checkpoint import content_hash
from flowalign.record.metrics import read_metrics, without_times
from flowalign.types import Condition, Guidance, TrainBatch
from tests.engine.toy import settings
from tests.families.ours import LENGTH, flowalign, write_run
from tests.families.tiny import FAMILIES

Dtype = Literal["float32", "bfloat16"]
ANEW: tuple[ActivationCheckpointing, ...] = ("blocks", "selective")
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
SHORT, LONG = "a red cube", "two small dogs run over the grass near the old house, with a zebra and a camel"
# Both of FLUX.1 have one class of network, as both of Z-Image.
NAMES = [name for name in FAMILIES if name not in ("flux-schnell", "z_image-turbo")]


@pytest.fixture(scope="module")
def policies(tiny: Callable[..., Path]) -> Callable[[str, bool], Policy]:
    """Return the policy of a tiny pipeline, whose LoRA has no factor of zeros; loaded once, not to be changed."""
    loaded: dict[tuple[str, bool], Policy] = {}

    def load(name: str, lora: bool = False) -> Policy:
        if (name, lora) not in loaded:
            own = LoraConfig(rank=2, alpha=3) if lora else None
            policy = load_policy(ModelConfig(path=str(tiny(name)), max_sequence_length=LENGTH, lora=own))
            generator = torch.Generator().manual_seed(2)
            for parameter in policy.network.module.parameters():
                if parameter.requires_grad and lora:
                    parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
            loaded[name, lora] = policy
        return loaded[name, lora]

    return load


def copied(policy: Policy, how: ActivationCheckpointing) -> Network:
    module = copy.deepcopy(policy.network.module)
    checkpoint_activations(module, how)
    return policy.network.with_module(module)


def condition_of(policy: Policy, count: int = 4) -> Condition:
    """Texts of two lengths, and negative ones of another: two passes of a guided velocity are two calls."""
    prompts = [SHORT, LONG] * (count // 2)
    return policy.encoders.encode_prompts(prompts, LENGTH, negatives=[f"{LONG}, {LONG}"] * count)


def latents(network: Network, seed: int, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *network.latent_shape(64, 96), generator=generator)


def learned(policy: Policy, how: ActivationCheckpointing, dtype: Dtype) -> tuple[list[dict[str, float]], str, str]:
    """Metrics of three updates of two micro-batches, and the hashes of weights and moments after them."""
    network, condition = copied(policy, how), condition_of(policy)
    velocity, guidance = guided(network), Guidance(3.0)
    engine = build_engine(network.module, settings(type="torch", dtype=dtype, warmup_steps=0))

    def loss(batch: TrainBatch) -> LossOutput:
        x, t = batch.tensors["x"], batch.tensors["t"]
        first = velocity(x, t, batch.condition, guidance=guidance)
        with torch.no_grad():  # as a reference is asked, between a pass and its backward
            target = velocity(-x, t, batch.condition)
        return LossOutput((first + velocity(x / 2, t, batch.condition) - target).square().mean())

    metrics = []
    for step in range(3):
        x = latents(network, step)
        batch = TrainBatch({"x": x, "t": torch.linspace(0.1, 0.9, 4)}, condition, {})
        parts = [batch.take(index) for index in torch.arange(4).split(2)]
        metrics.append(engine.step(loss, parts, [0.5, 0.5]))
    return metrics, content_hash(engine.weights()), content_hash(engine.optimizer_state()[0])


@pytest.mark.parametrize(
    ("name", "lora", "dtype"),
    [
        *((name, *own) for name in NAMES for own in ((False, "float32"), (True, "bfloat16"))),
        *(("sd3", *own) for own in ((False, "bfloat16"), (True, "float32"))),
    ],
)
def test_three_updates_have_the_same_losses_gradients_and_weights(
    policies: Callable[..., Policy], name: str, lora: bool, dtype: Dtype
) -> None:
    policy = policies(name, lora)
    plain = learned(policy, "none", dtype)
    assert plain[0][0]["loss"] != plain[0][2]["loss"]
    for how in ANEW:
        assert learned(policy, how, dtype) == plain, how


@pytest.mark.parametrize("how", ANEW)
def test_random_draws_are_drawn_again_as_they_were(
    policies: Callable[..., Policy], how: ActivationCheckpointing
) -> None:
    policy, found = policies("sd3"), []
    for way in ("none", how):
        network = copied(policy, way)
        for module in network.module.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        network.module.train()
        torch.manual_seed(5)
        x = latents(network, 0)
        losses = [network.velocity(x, torch.full((4,), t), condition_of(policy)).square().mean() for t in (0.2, 0.8)]
        sum(losses, torch.zeros(())).backward()
        gradients = {n: p.grad for n, p in network.module.named_parameters() if p.grad is not None}
        found.append((losses, content_hash(gradients), torch.randn(1)))
    assert found[0][0] != losses_without_dropout(policy)
    assert found[0] == found[1]


def losses_without_dropout(policy: Policy) -> list[Tensor]:
    network, x = copied(policy, "none"), latents(policy.network, 0)
    return [network.velocity(x, torch.full((4,), t), condition_of(policy)).square().mean() for t in (0.2, 0.8)]


def kept_for_backward(network: Network, condition: Condition) -> int:
    """Bytes of the memories that a velocity keeps for its backward pass, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.module.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.velocity(latents(network, 0), torch.full((4,), 0.5), condition)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("name", NAMES)
def test_less_is_kept_for_the_backward_pass(policies: Callable[..., Policy], name: str) -> None:
    policy = policies(name)
    plain, anew = (kept_for_backward(copied(policy, how), condition_of(policy)) for how in ("none", "blocks"))
    assert anew < plain / 2


class Ran(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operators(network: Network, condition: Condition) -> tuple[Counter[str], Counter[str]]:
    """The operators of a velocity in bfloat16, and those of its backward pass."""
    with Ran() as first, torch.autocast("cpu", torch.bfloat16):
        loss = network.velocity(latents(network, 0), torch.full((4,), 0.5), condition).square().sum()
    with Ran() as second:
        loss.backward()
    return first.counts, second.counts


def test_selective_keeps_products_and_attention_and_computes_the_rest_anew(policies: Callable[..., Policy]) -> None:
    policy = policies("sd3")
    condition = policy.encoders.encode_prompts([SHORT] * 4, LENGTH)
    plain, blocks, selective = (operators(copied(policy, how), condition)[1] for how in ("none", *ANEW))
    assert plain[FLASH] == selective[FLASH] == 0 < blocks[FLASH]
    # Those that modulate are of few rows and many columns.
    assert plain["addmm"] == 0 and selective["addmm"] == 3 < blocks["addmm"]
    assert plain["gelu"] == 0 < selective["gelu"] == blocks["gelu"]


@pytest.mark.parametrize("how", ANEW)
def test_a_block_is_computed_anew_by_the_kernel_that_it_was_computed_by(
    policies: Callable[..., Policy], how: ActivationCheckpointing
) -> None:
    """Short sequences in bfloat16 take plain products on a CPU, by a context that ends before the backward pass."""
    policy = policies("sd3")
    short = policy.encoders.encode_prompts([SHORT] * 4, 16)
    forward, backward = operators(copied(policy, how), short)
    assert not forward[FLASH] and not backward[FLASH] and backward["_softmax_backward_data"]


def test_a_copy_computes_with_its_own_weights(policies: Callable[..., Policy]) -> None:
    first = copied(policies("sd3"), "blocks")
    second = first.with_module(copy.deepcopy(first.module))
    x, t, condition = latents(first, 0), torch.full((4,), 0.5), condition_of(policies("sd3"))
    before = first.velocity(x, t, condition)
    for parameter in second.module.parameters():
        parameter.data.mul_(0.5)
    assert torch.equal(first.velocity(x, t, condition), before)
    assert not torch.equal(second.velocity(x, t, condition), before)
    second.velocity(x, t, condition).square().sum().backward()
    assert all(parameter.grad is None for parameter in first.module.parameters())


def test_the_hook_of_diffusers_is_of_no_use_to_chroma(policies: Callable[..., Policy]) -> None:
    """It leaves out the mask of single blocks. Where this fails diffusers has learned it, and ours may go."""
    network, condition = copied(policies("chroma"), "none"), condition_of(policies("chroma"))
    x, t, module = latents(network, 0), torch.full((4,), 0.5), network.module
    plain = network.velocity(x, t, condition)
    module.enable_gradient_checkpointing()  # type: ignore[operator]
    assert (network.velocity(x, t, condition) - plain).norm() > 0.01 * plain.norm()


def test_a_product_that_is_changed_in_place_is_refused_by_selective(policies: Callable[..., Policy]) -> None:
    class InPlace(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            made = input.matmul(self.weight.t())
            made += self.bias
            return made

    network = copied(policies("sd3"), "selective")
    block: Any = network.module.get_submodule("transformer_blocks.0.attn")
    block.to_q.__class__ = InPlace
    with pytest.raises(
        ModelError, match=r"^learner.activation_checkpointing: aten.add_.Tensor changes a product in place"
    ):
        network.velocity(latents(network, 0), torch.full((4,), 0.5), condition_of(policies("sd3")))


def test_a_network_that_names_no_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match=r"^learner.activation_checkpointing: Linear names no blocks"):
        checkpoint_activations(torch.nn.Linear(1, 1), "blocks")
    checkpoint_activations(torch.nn.Linear(1, 1), "none")


@pytest.mark.parametrize("name", ["sd3", "chroma"])
def test_a_run_has_the_same_rows_replay_and_checkpoint_and_goes_on_otherwise(
    tiny: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    def align(how: str, *changes: str) -> Path:
        (folder := tmp_path / how).mkdir(exist_ok=True)
        run = write_run(folder, tiny(name))
        flowalign("align", run, "algorithm.beta=0.1", *changes)
        return folder / "runs" / "once"

    found = []
    for how in ("none", *ANEW):
        made = align(how, f"learner.activation_checkpointing={how}")
        rows = [without_times(row) for row in read_metrics(made / "metrics.jsonl")]
        assert rows[-1]["replay/max_abs_dlogp"] == 0
        found.append((rows, (made / "checkpoints" / "step_000001" / "model.safetensors").read_bytes()))
    assert found[0] == found[1] == found[2]
    made = align("blocks", "iterations=2", "learner.activation_checkpointing=selective")
    assert [row["iteration"] for row in read_metrics(made / "metrics.jsonl")] == [1, 2]
