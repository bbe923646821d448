"""Linear layers of a frozen base whose weights are stored smaller than they compute: bfloat16, or 8 bits.

Eight bits are whole numbers from -127 to 127 times one scale an output, the largest weight of it over 127
(arXiv:2208.07339, sec. 2.1, of weights alone). torchao has the same. It is not used, for its weights take no part in
autocast, so that a bfloat16 run would compute in float32, and they hide the memory that ``learner.offload`` moves.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowalign.config.sections import BaseDtype
from flowalign.models.blocks import blocks_of

_LARGEST = 127


class StoredLinear(nn.Module):
    """A frozen linear layer that computes in the dtype of its input, or of autocast where that is on.

    ``weight`` (O, I) and ``scale`` (O, 1) are buffers: no engine shards them, casts them or sends them to other ranks.
    """

    weight: Tensor
    scale: Tensor | None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = None
        if dtype == torch.int8:
            weight, scale = quantized(weight)
        self.register_buffer("weight", weight.to(dtype), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Product.apply(x.to(dtype), self.weight, self.scale, bias)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """The product with a weight that is made anew for the backward pass: it would be as large as what was saved."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, restored(weight, scale, x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, scale, _ = inputs
        ctx.save_for_backward(weight, scale)
        ctx.save_for_forward(weight, scale)
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        [gradient] = gradients
        return gradient.matmul(restored(weight, scale, ctx.dtype)), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        weight, scale = ctx.saved_tensors
        return nn.functional.linear(tangents[0], restored(weight, scale, ctx.dtype))


def quantized(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return the int8 numbers (O, I) and the float32 scales (O, 1) whose product is nearest to a weight."""
    weight = weight_OI.float()
    scale = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
    return (weight / scale).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scale


def restored(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the weight that `StoredLinear` computes with."""
    return weight.to(dtype) if scale is None else (weight.to(torch.float32) * scale).to(dtype)


def store_base(network: nn.Module, dtype: BaseDtype) -> None:
    """Let the frozen linear layers in a network's blocks, those below a LoRA too, store their weights in ``dtype``.

    All else stays as it is: embeddings, norms and the last layer are few, and matter more.
    """
    for block in blocks_of(network):
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and not child.weight.requires_grad:
                    setattr(parent, name, StoredLinear(child, getattr(torch, dtype)))


def stored_values(network: nn.Module) -> int:
    """Return the number of weights that `store_base` has taken out of a network's parameters."""
    return sum(part.weight.numel() for part in network.modules() if isinstance(part, StoredLinear))
