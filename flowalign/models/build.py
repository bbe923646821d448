"""A policy from its configuration: model family, LoRA, and the frozen reference."""

from __future__ import annotations

import copy
import importlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.algorithm import VelocityModel
from flowalign.config.sections import LoraConfig, ModelConfig
from flowalign.models.base import ModelError, Policy
from rewards.usercode.loading import load_module


def policy_class(name: str) -> type[Any]:
    """The class in ``flowalign/models/<name>.py`` (or a dotted path) that can ``load`` a directory.

    Raises:
        ModelError: there is no such module, it does not import, or holds no such class.
    """
    module_name = name if "." in name else f"flowalign.models.{name}"
    try:
        module = load_module(module_name) if "." in name else importlib.import_module(module_name)
    except Exception as error:  # a module of the user's may raise anything
        raise ModelError(f"model.type: cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    for value in vars(module).values():
        if isinstance(value, type) and value.__module__ == module.__name__ and _is_policy(value):
            return value
    raise ModelError(f"model.type: {module_name} holds no policy class")


def _is_policy(value: type[Any]) -> bool:
    protocol = getattr(value, "_is_protocol", False)
    return not protocol and hasattr(value, "encode_prompts") and callable(getattr(value, "load", None))


def load_policy(config: ModelConfig, *, device: str = "cpu") -> Policy:
    """Load the pipeline directory and, if asked, put a fresh LoRA on its transformer.

    Without a LoRA every parameter of the network is trainable; with one, only the adapter is. What is
    trainable is float32, whatever ``config.dtype`` says of the rest.

    Raises:
        ModelError: the directory, the fresh network or its inputs cannot be had.
    """
    policy = policy_class(config.type).load(
        Path(config.path),
        max_sequence_length=config.max_sequence_length,
        device=device,
        dtype=getattr(torch, config.dtype),
    )
    if config.transformer is not None:
        from flowalign.models.architectures.fresh import TransformerSpec, new_transformer

        spec = TransformerSpec(**config.transformer.model_dump())
        policy.use_network(new_transformer(policy.network.config, spec))  # type: ignore[arg-type]
    if config.inputs:
        from flowalign.models.architectures.inputs import add_inputs

        add_inputs(policy.network, config.inputs)
    policy.family = config.family or "rf"
    if config.lora is None:
        policy.network.requires_grad_(True)
    else:
        add_lora(policy, config.lora)
    for parameter in policy.network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return policy


def add_lora(policy: Policy, config: LoraConfig, *, seed: int = 0) -> None:
    """A PEFT LoRA named ``default``; its initial weights depend on ``seed`` alone.

    Raises:
        ModelError: no layer that can have a LoRA goes by the name of a target.
    """
    from peft import LoraConfig as PeftConfig

    policy.network.requires_grad_(False)
    adapter = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        init_lora_weights="gaussian",
        target_modules=config.targets or policy.lora_targets,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            policy.network.add_adapter(adapter)  # type: ignore[operator]
        except ValueError as error:
            raise ModelError(f"model.lora.targets: {' '.join(str(error).split())}") from error


def count_parameters(network: nn.Module) -> tuple[int, int]:
    """How many are trained, of how many."""
    parameters = list(network.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def has_lora(network: nn.Module) -> bool:
    return bool(getattr(network, "peft_config", None))


def reference_velocity(policy: Policy) -> VelocityModel:
    """The frozen start of the run: the network without its adapter, or a frozen copy of it."""
    if has_lora(policy.network):

        @torch.no_grad()
        def without_adapter(x: Tensor, t: Tensor, condition: Any, **kwargs: Any) -> Tensor:
            with disabled_adapters(policy.network):
                return policy.velocity(x, t, condition, **kwargs)

        return without_adapter
    frozen = copy.copy(policy)
    frozen.network = copy.deepcopy(policy.network).requires_grad_(False).eval()

    @torch.no_grad()
    def frozen_copy(x: Tensor, t: Tensor, condition: Any, **kwargs: Any) -> Tensor:
        return frozen.velocity(x, t, condition, **kwargs)

    return frozen_copy


@contextmanager
def disabled_adapters(network: nn.Module):
    """Adapters off, without touching ``requires_grad``: a backward pass may be under way."""
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
