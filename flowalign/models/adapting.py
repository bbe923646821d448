"""A LoRA on a network: the layers that it lies on, and what the file of an adapter asks of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

import torch
from torch import nn

from flowalign.config.sections import LoraConfig
from flowalign.models.adapters import ENDS, Adapter, AdapterError
from flowalign.models.errors import ModelError

ADAPTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def settled(config: LoraConfig, adapter: Adapter, network: nn.Module) -> LoraConfig:
    """Return ``config`` with the rank, alpha and targets of ``adapter``, which fits the bare ``network``.

    Raises:
        AdapterError: it lies on layers that the network has not, or ``config`` asks for something else.
    """
    _check_fits(adapter, network)
    given = config.model_fields_set
    for name, found in (("rank", adapter.rank), ("alpha", adapter.alpha)):
        if name in given and getattr(config, name) != found:
            raise AdapterError(
                f"model.lora.{name}: is {getattr(config, name):g}, and {adapter.file} has {found:g}; leave it out"
            )
    targets = _ends(adapter, network)
    if config.targets is not None:
        if set(layers_of(network, config.targets)) != set(adapter.layers):
            raise AdapterError(
                f"model.lora.targets: are {', '.join(config.targets)}, and {adapter.file} lies on {_few(targets)}; "
                "leave them out"
            )
        targets = config.targets
    return config.model_copy(update={"rank": adapter.rank, "alpha": adapter.alpha, "targets": list(targets)})


@torch.no_grad()
def begin_from(network: nn.Module, adapter: Adapter) -> None:
    """Copy the weights of ``adapter`` into the LoRA of the same rank and layers that ``network`` has."""
    own = dict(network.named_parameters())
    for name, value in adapter.weights().items():
        layer, end = name[: -len(ENDS[0])], name[-len(ENDS[0]) :]
        own[f"{layer}{end.removesuffix('.weight')}.default.weight"].copy_(value)


def layers_of(network: nn.Module, targets: Iterable[str]) -> list[str]:
    """Return the names of the layers that can have a LoRA and end in one of ``targets``."""
    ends = tuple(targets)
    names = (name for name, module in network.named_modules() if isinstance(module, ADAPTED))
    return [name for name in names if any(name == end or name.endswith(f".{end}") for end in ends)]


def check_targets(network: nn.Module, targets: Sequence[str]) -> None:
    """Raise ModelError, naming near ones, for a target that no layer's name of the bare ``network`` ends in."""
    for target in targets:
        if layers_of(network, [target]):
            continue
        ends: dict[str, None] = {}
        for name, module in network.named_modules():
            parts = name.split(".") if isinstance(module, nn.Linear) else []
            ends |= dict.fromkeys(".".join(parts[-n:]) for n in range(1, min(4, len(parts)) + 1))
        known = [end for end in ends if not end.split(".")[0].isdigit()]
        near = get_close_matches(target, known, n=3, cutoff=0.5) or known[:3]
        raise ModelError(f"model.lora.targets: no layer's name ends in {target!r}; near are {', '.join(near)}")


def _check_fits(adapter: Adapter, network: nn.Module) -> None:
    linear = {n: (m.in_features, m.out_features) for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    for layer, shape in adapter.layers.items():
        said = f"model.lora.path: {adapter.file} has {layer}{ENDS[0]}, "
        if layer not in linear:
            near = get_close_matches(layer, linear, n=1)
            more = f"; near is {near[0]}" if near else ""
            raise AdapterError(f"{said}which fits no layer of this model{more}; give an adapter of this very model")
        if linear[layer] != shape:
            raise AdapterError(
                f"{said}for a layer of {shape[0]} to {shape[1]} features, which is {linear[layer][0]} to "
                f"{linear[layer][1]} here; give an adapter of this very model"
            )


def _ends(adapter: Adapter, network: nn.Module) -> list[str]:
    """Return the shortest list of ends that name the adapter's layers and no others: of the family's own targets, of
    its configuration's, else whole names."""
    own = [end for end in adapter.family.lora_targets if layers_of(network, [end])]
    own = [end for end in own if set(layers_of(network, [end])) <= set(adapter.layers)]
    for ends in (own, sorted(adapter.targets)):
        if set(layers_of(network, ends)) == set(adapter.layers):
            return ends
    return list(adapter.layers)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
