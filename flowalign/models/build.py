"""Networks and encoders from their configuration: model family, LoRA, and the frozen reference."""

from __future__ import annotations

import copy
import hashlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.algorithm import VelocityModel
from flowalign.config.sections import LoraConfig, ModelConfig
from flowalign.models import loading
from flowalign.models.adapters import read_adapter
from flowalign.models.adapting import begin_from, check_targets, settled
from flowalign.models.base import Policy
from flowalign.models.directory import family_of_model, refuse_absent
from flowalign.models.embeddings import EmbeddingStore
from flowalign.models.encoders import Encoders
from flowalign.models.errors import ModelError
from flowalign.models.family import module_config
from flowalign.models.guided import frozen, guided
from flowalign.models.network import Network
from flowalign.models.stored_linear import store_base, stored_values


def load_policy(
    config: ModelConfig,
    *,
    device: str = "cpu",
    begin: bool = True,
    text: bool = True,
    embeddings: EmbeddingStore | None = None,
) -> Policy:
    """Load both halves of a pipeline directory, see `load_network` and `load_encoders`, and move them to ``device``.

    Raises:
        ModelError: the directory, the fresh network or its inputs cannot be had.
    """
    network, encoders = load_network(config, begin=begin), load_encoders(config, text=text, embeddings=embeddings)
    network.module.to(device)
    return Policy(network, encoders.to(device))


def load_encoders(config: ModelConfig, *, text: bool = True, embeddings: EmbeddingStore | None = None) -> Encoders:
    """Load the encoders, which do not learn, on the CPU; they read and keep texts in ``embeddings``.

    Without ``text`` it loads the autoencoder alone. Raise ModelError where that fails.
    """
    dtype = getattr(torch, config.dtype)
    encoders = loading.load_encoders(family_of_model(config), Path(config.path), dtype=dtype, text=text)
    encoders.embeddings = embeddings
    return encoders


def load_network(config: ModelConfig, *, begin: bool = True) -> Network:
    """Load the network of a pipeline directory, on the CPU, and if asked a LoRA on it, fresh or that of
    ``lora.path``; no encoder is loaded. Without ``begin`` whoever loads it binds the weights, and those of
    ``lora.path`` are 0 and not read.

    Without a LoRA every parameter of the network is trainable; with one, only the adapter is. What is
    trainable is float32, whatever ``config.dtype`` and ``config.base_dtype`` say of the rest.

    Raises:
        ModelError: the directory, the fresh network or its inputs cannot be had.
        AdapterError: ``lora.path`` holds no adapter of this model.
    """
    family = family_of_model(config)
    refuse_absent(family, config)
    network = loading.load_network(family, Path(config.path), dtype=_loaded_dtype(config))
    network.mixed = config.dtype == "bfloat16"
    if config.transformer is not None:
        assert family.fresh is not None  # see `refuse_absent`
        network.module = family.fresh(module_config(network.module), config.transformer).eval()
    if config.inputs:
        from flowalign.models.inputs import add_inputs

        add_inputs(network.module, config.inputs)
    network.path_family, network.attention = config.family or "rf", config.attention
    lora, adapter = config.lora, None
    if lora is not None and lora.path is not None and (begin or not lora.is_settled):
        adapter = read_adapter(family, Path(lora.path))
        lora = settled(lora, adapter, network.module)
    if lora is None:
        network.module.requires_grad_(True)
    else:
        add_lora(network, lora)
    for parameter in network.module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if lora is not None and lora.path is not None:
                parameter.data.zero_()
    if adapter is not None and begin:
        begin_from(network.module, adapter)
    if config.base_dtype is not None and getattr(torch, config.base_dtype) != _loaded_dtype(config):
        store_base(network.module, config.base_dtype)
    return network


def _loaded_dtype(config: ModelConfig) -> torch.dtype:
    """Return what a network is loaded in, before its base is stored smaller: float32 where that is asked for."""
    return torch.float32 if config.base_dtype == "float32" else getattr(torch, config.dtype)


def add_lora(network: Network, config: LoraConfig, *, seed: int = 0) -> None:
    """Add a PEFT LoRA named ``default``; its initial weights depend on ``seed`` alone.

    Raises:
        ModelError: no layer that can have a LoRA goes by the name of a target, or one that does cannot.
    """
    from peft import LoraConfig as PeftConfig

    network.module.requires_grad_(False)
    check_targets(network.module, config.targets or ())
    adapter = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        init_lora_weights="gaussian",
        target_modules=config.targets or network.lora_targets,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network.module.add_adapter(adapter)  # type: ignore[operator]
        except ValueError as error:
            raise ModelError(f"model.lora.targets: {' '.join(str(error).split())}") from error


def count_parameters(network: nn.Module) -> tuple[int, int]:
    """Return the number of trained parameters, and of all."""
    parameters = list(network.parameters())
    total = sum(p.numel() for p in parameters) + stored_values(network)
    return sum(p.numel() for p in parameters if p.requires_grad), total


def buffers_hash(network: nn.Module) -> str | None:
    """Return a hash of what a network's files hold beside its parameters, such as positions; None where that is none.

    It is of the values in bfloat16, in which the network may be loaded.
    """
    digest, found = hashlib.sha256(), False
    for part in network.modules():
        for name, value in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                found = True
                rounded = value.detach().cpu().to(torch.bfloat16) if value.is_floating_point() else value.detach().cpu()
                digest.update(f"{name} {tuple(value.shape)}".encode())
                digest.update(rounded.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest() if found else None


def has_lora(network: nn.Module) -> bool:
    return bool(getattr(network, "peft_config", None))


def reference_velocity(network: Network, device: str | torch.device | None = None) -> VelocityModel:
    """Return the frozen start of the run: the network without its adapter, or a frozen copy of it, on ``device``.

    The start of a run that begins from an adapter is `start.StartingAdapter`.
    """
    if not has_lora(network.module):
        return frozen(frozen_copy(network, device))
    velocity = guided(network)

    @torch.no_grad()
    def without_adapter(x: Tensor, t: Tensor, condition: Any, **kwargs: Any) -> Tensor:
        with disabled_adapters(network.module):
            return velocity(x, t, condition, **kwargs)

    return without_adapter


def frozen_copy(network: Network, device: str | torch.device | None = None) -> Network:
    """Return a network with its own copy of the weights, which do not learn; ``device`` None is the network's."""
    module = copy.deepcopy(network.module).eval()
    own = network.with_module(module if device is None else module.to(device))
    if network.compiled:  # whose graph is one that learns, though nobody asks it for a gradient
        own.compile()
    else:
        module.requires_grad_(False)
    return own


@contextmanager
def disabled_adapters(network: nn.Module):
    """Switch adapters off inside, without touching ``requires_grad``: a backward pass may be under way."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


@torch.no_grad()
def bind_weights(network: nn.Module, weights: dict[str, Tensor]) -> int:
    """Copy trainable parameters into the network by name; returns how many tensors were bound.

    Raises:
        ModelError: a name or shape does not fit.
    """
    own = dict(network.named_parameters())
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            raise ModelError(f"weight sync: {name} {tuple(value.shape)} does not fit the rollout model")
        own[name].copy_(value)
    return len(weights)
