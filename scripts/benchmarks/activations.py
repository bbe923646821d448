"""What ``learner.activation_checkpointing`` saves and costs, on an MM-DiT of 24 blocks and a CPU's size, as JSON.

    python scripts/benchmarks/activations.py --threads 2 > activations.json

The same network learns from the same batch in each way, in turns; that loss and gradients are the same to the bit is
checked first. ``saved_mib`` are the tensors that autograd and the policy of ``selective`` keep for the backward pass,
each memory once, without parameters. ``held_mib`` is what the allocator has given out in the forward pass and has not
got back. ``seconds`` are medians of a forward and backward pass, with the least and the most.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from cells import machine, positive
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowalign.config.sections import LoraConfig
from flowalign.engine.accumulate import autocast
from flowalign.flow.randomness import seeded
from flowalign.models import activation_checkpointing
from flowalign.models.families.sd3 import FAMILY
from flowalign.record.checkpoint import content_hash
from flowalign.shapes.build.pipeline import new_transformer

WAYS = ("none", "selective", "blocks")
TEXT = 64  # width of a text's features
MIB = 2**20


def network(how: str, layers: int, heads: int, side: int, rank: int, dtype: str) -> nn.Module:
    """An MM-DiT over ``side`` × ``side`` latents, none of its layers zero; with a ``rank`` a LoRA learns alone.

    What does not learn is of the ``dtype``, as a model that is loaded so.
    """
    torch.manual_seed(0)
    module: Any = new_transformer(TEXT, TEXT, num_layers=layers, num_heads=heads, side=side)
    if rank:
        from peft import LoraConfig as PeftConfig

        scale = LoraConfig(rank=rank).alpha
        module.requires_grad_(False)
        module.add_adapter(PeftConfig(r=rank, lora_alpha=scale, target_modules=list(FAMILY.lora_targets)))  # type: ignore[arg-type]
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    activation_checkpointing.checkpoint_activations(module, how)
    return module


def batch(count: int, side: int, tokens: int) -> dict[str, Any]:
    generator = seeded(0)
    return {
        "hidden_states": torch.randn(count, 16, side, side, generator=generator),
        "timestep": torch.linspace(100, 900, count),
        "encoder_hidden_states": torch.randn(count, tokens, TEXT, generator=generator),
        "pooled_projections": torch.randn(count, TEXT, generator=generator),
        "return_dict": False,
    }


def loss_of(module: nn.Module, given: dict[str, Any], dtype: str) -> Tensor:
    with autocast("cpu", dtype):
        return module(**given)[0].float().square().mean()


def saved_bytes(module: nn.Module, given: dict[str, Any], dtype: str) -> int:
    """Return the bytes of the memories that are kept for the backward pass, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor  # so that nothing else comes to lie there
        return tensor

    # Where torch has it: what the policy keeps goes through the same hooks.
    counted = functools.partial(checkpoint, respect_saved_tensors_hooks=True)
    activation_checkpointing.checkpoint = counted  # type: ignore[attr-defined]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss_of(module, given, dtype)
    finally:
        activation_checkpointing.checkpoint = checkpoint  # type: ignore[attr-defined]
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def held_bytes(module: nn.Module, given: dict[str, Any], dtype: str) -> int:
    """Return the bytes that a forward pass has taken from the allocator and not given back."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    gc.collect()
    gc.disable()  # what an earlier pass has left would count as given back by this one
    try:
        with torch.profiler.profile(activities=activities, profile_memory=True) as seen:
            loss = loss_of(module, given, dtype)
    finally:
        gc.enable()
    held = sum(event.self_cpu_memory_usage for event in seen.events() or [])
    assert loss.requires_grad
    return int(held)


def answer(module: nn.Module, given: dict[str, Any], dtype: str) -> str:
    """Return the hash of loss and gradients."""
    loss = loss_of(module, given, dtype)
    loss.backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return content_hash({**found, "loss": loss.detach()})


def seconds(passes: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of passes that take turns."""
    taken: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(repeats):
        for name, call in passes.items():
            began = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - began)
    return taken


def measured(options: argparse.Namespace) -> dict[str, Any]:
    size = (options.layers, options.heads, options.side, options.rank, options.dtype)
    given = batch(options.batch, options.side, options.tokens)
    networks = {way: network(way, *size) for way in WAYS}
    answers = {way: answer(module, given, options.dtype) for way, module in networks.items()}
    assert len(set(answers.values())) == 1, f"loss or gradients differ: {answers}"
    taken = seconds(
        {way: functools.partial(answer, module, given, options.dtype) for way, module in networks.items()},
        options.repeats,
    )
    ways = {}
    for way, module in networks.items():
        saved, held = (count(module, given, options.dtype) for count in (saved_bytes, held_bytes))
        ways[way] = {
            "saved_mib": round(saved / MIB, 1),
            "held_mib": round(held / MIB, 1),
            "seconds": round(statistics.median(taken[way]), 3),
            "least_and_most": [round(min(taken[way]), 3), round(max(taken[way]), 3)],
        }
    plain = ways["none"]
    ratios = {
        way: {key: round(own[key] / plain[key], 3) for key in ("saved_mib", "held_mib", "seconds")}
        for way, own in ways.items()
    }
    parameters = sum(p.numel() for p in networks["none"].parameters())
    return {"parameters": parameters, "same_bits": True, "ways": ways, "to_none": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--layers", type=positive, default=24)
    parser.add_argument("--heads", type=positive, default=4, help="of 64, so the width is 64 times that")
    parser.add_argument("--side", type=positive, default=32, help="latents a side; a token is 2 by 2 of them")
    parser.add_argument("--tokens", type=positive, default=64, help="tokens of a text")
    parser.add_argument("--batch", type=positive, default=2)
    parser.add_argument("--rank", type=positive, default=0, help="of a LoRA, which learns alone; else all weights do")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record = {"benchmark": "activations", **vars(options), "machine": machine(options.threads), **measured(options)}
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
