"""The start of a run that begins from an adapter: a frozen copy of it, on the same network as the one that learns."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.models.guided import guided
from flowalign.models.network import Network

NAME = "start"
LEARNS = "default"


class StartingAdapter:
    """The network with its LoRA as it was when this was made; the layers below are those of the policy.

    The copies are buffers: no engine shards them or learns them, whatever it does with parameters.
    """

    def __init__(self, network: Network) -> None:
        module: Any = network.module
        learns = {name: p.requires_grad for name, p in module.named_parameters()}
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            module.add_adapter(copy.deepcopy(module.peft_config[LEARNS]), adapter_name=NAME)
        module.set_adapter(LEARNS)
        self._layers = _adapted(module)
        self._held: dict[str, nn.Module] = {}
        for place, layer in self._layers.items():
            for factor in ("lora_A", "lora_B"):
                frozen, trained = (getattr(layer, factor)[name] for name in (NAME, LEARNS))
                del frozen.weight
                frozen.register_buffer("weight", trained.weight.detach().clone(), persistent=False)
                self._held[f"{place}.{factor}.{LEARNS}.weight"] = frozen
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(learns[name])
        self._velocity = guided(network)

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Tensor, condition: Any, **kwargs: Any) -> Tensor:
        """Compute the velocity of the start, see `Network.velocity`."""
        with self._active():
            return self._velocity(x, t, condition, **kwargs)

    def weights(self) -> dict[str, Tensor]:
        """Return the copies, on the CPU, by the names of the parameters that they are copies of."""
        return {name: holder.weight.detach().to("cpu", copy=True) for name, holder in self._held.items()}  # type: ignore[operator]

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Hold what `weights` returned earlier."""
        for name, holder in self._held.items():
            holder.weight.copy_(weights[name])  # type: ignore[operator]

    @contextmanager
    def _active(self) -> Iterator[None]:
        """Compute with the copies inside, without touching ``requires_grad``: a backward pass may be under way."""
        before = {place: layer._active_adapter for place, layer in self._layers.items()}
        for layer in self._layers.values():
            layer._active_adapter = [NAME]
        try:
            yield
        finally:
            for place, layer in self._layers.items():
                layer._active_adapter = before[place]


def _adapted(module: nn.Module) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
