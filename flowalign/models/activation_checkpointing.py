"""Activations that the backward pass computes anew in the place of keeping them (arXiv:1604.06174), block by block.

A block's first pass and its second run the same kernels on the same numbers, so that no bit depends on it. diffusers
has such a hook of its own (``enable_gradient_checkpointing``). It does not serve: Chroma's hands single blocks no mask,
which changes what they compute, and no hook of it brings back the kernel of attention that a caller chose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from flowalign.models.attention import allowed_kernels
from flowalign.models.errors import ModelError

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
# Plain attention is not among them: the products that it is made of have a number for each pair of tokens.
_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)
# Columns of a product for each term of its sums, at most: a LoRA's second factor has far more, and is sooner computed
# than kept. A feed-forward layer has 4.
_WIDEST = 4


def checkpoint_activations(module: nn.Module, how: str) -> None:
    """Let a ``module`` of diffusers keep of its blocks' passes, where a gradient is asked for, what ``how`` says.

    ``none``: everything. ``blocks``: what goes into each. ``selective``: also products of matrices and what attention
    answers. Copies that are made of it afterwards do likewise.

    Raises:
        ModelError: its class names no blocks.
    """
    if how == "none":
        return
    names = block_classes(type(module))
    blocks = [block for block in module.modules() if type(block).__name__ in names]
    if not blocks:
        raise ModelError(
            f"learner.activation_checkpointing: {type(module).__name__} names no blocks that could be computed anew; "
            "write none"
        )
    for block in blocks:
        block.forward = _Recomputed(block, _selective if how == "selective" else noop_context_fn)


def block_classes(network: type) -> tuple[str, ...]:
    """Return the names of the classes of a network's blocks, as a class of diffusers tells them; empty: it does not."""
    return tuple(getattr(network, "_no_split_modules", None) or ())


class _Recomputed:
    """The forward pass of one block."""

    def __init__(self, block: nn.Module, contexts: Contexts) -> None:
        self._forward: Callable[..., Any] = block.forward
        self._contexts = contexts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        # Beside the autocast, which torch brings back by itself, the second pass needs the kernel of the first. What it
        # is given by name goes by place: torch saves that alone as other tensors are saved.
        run = partial(_run, self._forward, allowed_kernels(), tuple(kwargs))
        return checkpoint(run, *args, *kwargs.values(), use_reentrant=False, context_fn=self._contexts)


def _run(forward: Callable[..., Any], kernels: list[SDPBackend], names: Sequence[str], *args: Any) -> Any:
    first = len(args) - len(names)
    with sdpa_kernel(kernels):
        return forward(*args[:first], **dict(zip(names, args[first:], strict=True)))


def _selective() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    # Autocast keeps the casts of weights for all calls of a loss. The first pass of a second call casts none, the other
    # does; torch would count that as another computation. No cast is kept here, so that it need not be counted.
    SAC_IGNORED_OPS.add(torch.ops.aten._to_copy.default)
    return create_selective_checkpoint_contexts(_Policy())


class _Policy:
    """What is kept of one pass through a block, operator by operator."""

    def __init__(self) -> None:
        self._kept: set[int] = set()  # where the kept numbers lie; they lie there until the backward pass

    def __call__(self, context: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> Any:
        if operator._schema.is_mutable and self._kept.intersection(map(_place, args)):
            # The second pass would do it to what the first has left. Of a view torch does not see it.
            raise ModelError(
                f"learner.activation_checkpointing: {operator} changes a product in place, which selective keeps; "
                "write blocks"
            )
        kept = operator in _ATTENTION
        if operator in _PRODUCTS:
            terms, columns = args[-1].shape
            kept = columns <= _WIDEST * terms
        if kept:
            output = context.op_output
            self._kept |= {place for place in map(_place, output if isinstance(output, tuple) else [output]) if place}
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _place(value: Any) -> int:
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else 0
