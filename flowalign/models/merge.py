"""Averages of networks of one architecture ("model soups", arXiv:2203.05482): a start for a student of many.

Linear averages of fine-tuned copies of one base stay good where the copies lie in one basin of the loss; networks that
were trained apart do not average to anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.models.build import has_lora
from flowalign.models.errors import ModelError
from flowalign.models.network import Network

# What a configuration may differ in without its network computing anything else.
_NEUTRAL = ("sample_size",)


class MergeError(ModelError):
    """Models that cannot be averaged: which, and in what they differ."""


def fuse_lora(network: Network) -> None:
    """Add a LoRA to the weights it adapts and take it off; a network without one stays as it is."""
    module: Any = network.module
    if has_lora(module):
        module.fuse_lora()
        module.unload_lora()


def check_architecture(name: str, network: nn.Module, first_name: str, first: nn.Module) -> None:
    """Raise MergeError where the networks have other parameters, or compute otherwise with the same ones."""
    own, its = ({key: tuple(p.shape) for key, p in n.named_parameters()} for n in (first, network))
    wrong = sorted(key for key in {*own, *its} if own.get(key) != its.get(key))
    if wrong:
        key = wrong[0]
        raise MergeError(
            f"{name} is of another architecture than {first_name}: {len(wrong)} tensors differ, first {key} with "
            f"{its.get(key, 'no tensor')} where the other has {own.get(key, 'none')}"
        )
    facts = [_facts(n) for n in (first, network)]
    differs = sorted(key for key in {*facts[0], *facts[1]} if facts[0].get(key) != facts[1].get(key))
    if differs:
        key = differs[0]
        raise MergeError(
            f"{name} is of another architecture than {first_name}: its {key} is {facts[1].get(key)}, not "
            f"{facts[0].get(key)}"
        )


def shares(weights: Sequence[float], count: int) -> list[float]:
    """Return the share of each of ``count`` models; shares add up to 1, and without weights they are equal.

    Raises:
        MergeError: as many weights as models are needed, none negative and not all 0.
    """
    if weights and len(weights) != count:
        raise MergeError(f"--weight is given {len(weights)} times for {count} models; give one for each, or none")
    if any(not 0 <= weight for weight in weights) or (weights and not 0 < sum(weights) < float("inf")):
        got = ", ".join(f"{weight:g}" for weight in weights)
        raise MergeError(f"--weight: got {got}; give numbers from 0 up, not all 0, whose sum is finite")
    return [weight / sum(weights) for weight in weights] or [1 / count] * count


@torch.no_grad()
def add(total: dict[str, Tensor], network: nn.Module, share: float) -> None:
    """Add ``share`` of the network's parameters to ``total``, in float32 on the CPU."""
    for name, parameter in network.named_parameters():
        part = parameter.detach().to("cpu", torch.float32) * share
        total[name] = total[name] + part if name in total else part


def _facts(network: nn.Module) -> Mapping[str, Any]:
    config = dict(getattr(network, "config", {}))
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in _NEUTRAL}
