"""Heads that are linear layers one after another, without activation, as several published rewards have them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rewards.interface import SpecError

if TYPE_CHECKING:
    import torch

Layers = list[tuple["torch.Tensor", "torch.Tensor"]]


def chain(owner: str, file: str, tensors: dict[str, Any]) -> Layers:
    """Return weights and biases in the order of their numbers, in float32; a bias that is missing is 0.

    Each layer takes what the one before gives, the last gives one number. Raises ``SpecError`` for other tensors, with
    ``owner`` and ``file`` in its text.
    """

    def number(name: str) -> tuple[int, ...]:
        return tuple(int(part) for part in name.split(".") if part.isdigit())

    names = sorted((name.removesuffix("weight") for name in tensors if name.endswith("weight")), key=number)
    layers = []
    for name in names:
        weight = tensors[f"{name}weight"].float()
        layers.append((weight, tensors.get(f"{name}bias", weight.new_zeros(weight.shape[:1])).float()))
    sizes = [tuple(weight.shape) for weight, _ in layers]
    linear = all(len(size) == 2 and bias.shape == size[:1] for size, (_, bias) in zip(sizes, layers, strict=True))
    linear = linear and set(tensors) <= {f"{name}{part}" for name in names for part in ("weight", "bias")}
    if not sizes or not linear or sizes[-1][0] != 1 or any(a[0] != b[1] for a, b in pairwise(sizes)):
        shapes = {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}
        raise SpecError(f"{owner}: {file} holds {shapes}; give linear layers that end in one number")
    return layers


def applied(layers: Layers, features: torch.Tensor) -> torch.Tensor:
    """Return the head's number (N,) for features (N, D)."""
    for weight, bias in layers:
        features = features @ weight.T + bias
    return features[:, 0]
