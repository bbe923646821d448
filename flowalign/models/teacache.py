"""Skipping a transformer's blocks on steps that resemble earlier ones (TeaCache, arXiv:2411.19108).

diffusers has no TeaCache. Its own caches, FirstBlockCache and SeaCache, compare the first block's output or a spectrum,
decide for the whole batch, and so make an image depend on its neighbours. What is used of it is its hooks; what to
reuse is decided by ``flowalign.flow.caching``.

Shapes: N samples (2 N under guidance), L text tokens, T image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from flowalign.flow.caching import IDENTITY, Polynomial, StepCache, relative_l1
from flowalign.models.errors import ModelError

HOOK = "flowalign_teacache"
BLOCKS = ("transformer_blocks",)


class BlockCache:
    """A context in which ``network`` skips its blocks for the samples whose step resembles the last computed one.

    ``network``: a module with or without a LoRA, whose ``blocks`` are those of its family (`ModelFamily.cached`); it is
    called as ever, ``num_steps`` times a trajectory with the same number of rows. Compared is the first block's input
    after its norm and modulation. A sample that reuses gets the stored change of its image tokens in place of the
    blocks, before the last norm; only the others go through them. ``threshold`` and ``rescale`` are StepCache's.

    Call ``reset`` before each trajectory after the first. ``computed`` and ``reused`` count rows since construction.
    """

    def __init__(
        self,
        network: nn.Module,
        num_steps: int,
        threshold: float,
        rescale: Polynomial = IDENTITY,
        *,
        blocks: Sequence[str] = BLOCKS,
    ) -> None:
        self.network, self.blocks = network, blocks
        self.computed = self.reused = 0
        self._rule = lambda: StepCache(num_steps, threshold, rescale)
        self._hooked: list[nn.Module] = []
        self.reset()

    def reset(self) -> None:
        """Begin a new trajectory: nothing of the last one is reused."""
        self._cache = self._rule()
        self._before = torch.empty(0)
        self._residual: Tensor | None = None
        self.rows: Tensor | None = None  # the samples under way through the blocks; None: all

    def __enter__(self) -> BlockCache:
        """Hook the blocks. Raise ModelError where the network has no blocks to skip, or is being cached already."""
        blocks = _blocks(self.network, self.blocks)
        if any(HOOK in _registry(block).hooks for block in blocks):
            raise ModelError("this network is being cached already; leave the other cache first")
        self.reset()
        for index, block in enumerate(blocks):
            _registry(block).register_hook(_BlockHook(self, index == 0, index == len(blocks) - 1), HOOK)
            self._hooked.append(block)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._hooked:
            _registry(self._hooked.pop()).remove_hook(HOOK, recurse=False)
        self.reset()

    def begin(self, block: Any, hidden_NTD: Tensor, temb_ND: Tensor) -> None:
        """Choose, before the first block, the samples that go through the blocks."""
        if torch.is_grad_enabled():
            raise ModelError("a cached network has no gradient; call it under torch.no_grad()")
        if self._residual is not None and self._residual.shape != hidden_NTD.shape:
            raise ModelError(
                f"a cached trajectory of {tuple(self._residual.shape)} image tokens goes on with "
                f"{tuple(hidden_NTD.shape)}; call reset() before each trajectory, and never split its batch"
            )
        compute = self._cache.observe(block.norm1(hidden_NTD, emb=temb_ND)[0])
        count = int(compute.sum())
        self.computed += count
        self.reused += len(compute) - count
        self.rows = None if count == len(compute) else compute.nonzero().squeeze(1)
        self._before = hidden_NTD

    def end(self, hidden: Tensor) -> Tensor:
        """Return the image tokens of all samples (N, T, D) after the last block, given those of the samples in
        ``rows``."""
        if self.rows is None:
            self._residual = hidden - self._before
            return hidden
        assert self._residual is not None  # the first step computes all
        whole = self._before + self._residual
        self._residual[self.rows] = hidden - self._before[self.rows]
        whole[self.rows] = hidden
        return whole


class _BlockHook(ModelHook):
    """Runs one block on the samples under way, if any; the first asks the cache for them, the last gives them back."""

    def __init__(self, cache: BlockCache, first: bool, last: bool) -> None:
        super().__init__()
        self.cache, self.first, self.last = cache, first, last

    def new_forward(
        self, module: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        hidden, text = hidden_states, encoder_hidden_states
        if self.first:
            self.cache.begin(module, hidden, temb)
        rows = self.cache.rows
        if rows is not None:
            temb = temb[rows]
            hidden, text = (hidden[rows], text[rows]) if self.first else (hidden, text)
        if rows is None or len(rows):
            forward: Any = self.fn_ref.original_forward
            text, hidden = forward(hidden_states=hidden, encoder_hidden_states=text, temb=temb, **kwargs)
        return text, self.cache.end(hidden) if self.last else hidden


class Distances:
    """A context that collects what `flow.caching.fit` is fitted on, from full runs of ``network``.

    Call ``reset`` between trajectories. ``inputs`` and ``outputs`` hold the relative L1 change of the modulated input
    and of the network's output between each step and the one before, (N,) a step. ``blocks`` are as `BlockCache`'s.
    """

    def __init__(self, network: nn.Module, blocks: Sequence[str] = BLOCKS) -> None:
        self.network, self.blocks = network, blocks
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self._last: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def reset(self) -> None:
        self._last = {}

    def __enter__(self) -> Distances:
        """Hook the blocks. Raise ModelError where the network has no blocks to skip."""
        for module, into in ((_blocks(self.network, self.blocks)[0].norm1, self.inputs), (self.network, self.outputs)):
            self._handles.append(module.register_forward_hook(self._collector(into)))  # type: ignore[operator, union-attr]
        return self

    def __exit__(self, *exception: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _collector(self, into: list[Tensor]) -> Any:
        def collect(module: nn.Module, args: object, output: Any) -> None:
            value = output[0].detach()
            if id(into) in self._last:
                into.append(relative_l1(value, self._last[id(into)]))
            self._last[id(into)] = value

        return collect


def _blocks(network: nn.Module, lists: Sequence[str]) -> list[Any]:
    """Return the blocks of all lists, in the order in which they are called."""
    blocks = [block for name in lists for block in getattr(network, name, ())]
    if not blocks or not hasattr(blocks[0], "norm1"):
        raise ModelError(f"{type(network).__name__} has no transformer blocks that a cache knows how to skip")
    return blocks


def _registry(block: nn.Module) -> HookRegistry:
    return HookRegistry.check_if_exists_or_initialize(block)
