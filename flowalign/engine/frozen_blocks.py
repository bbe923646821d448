"""Frozen weights of a network's blocks that are kept off the device, and brought in block by block.

On a CPU they are the mapped files themselves: work on them brings pages in, which are given back once a block is done.
Otherwise the memory of a weight on the device is emptied and filled again; what autograd has saved of it, which are
views, sees that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.utils._pytree import tree_leaves

from flowalign.engine.offload import Offload, Room
from flowalign.models.blocks import blocks_of
from flowalign.models.errors import ModelError
from flowalign.models.stored_linear import StoredLinear


class FrozenBlocks:
    """The frozen weights of a module's blocks, of which one block's are in at a time.

    A block comes in with its forward pass, and for the backward pass with the first gradient of what it answered. It
    goes with the end of its forward pass, or when another comes. A weight that two parts share stays where it is.

    Raises:
        ModelError: in a derivative forward, of weights that have to be brought to the device.
    """

    def __init__(self, module: nn.Module, offload: Offload, device: torch.device) -> None:
        self._device = device
        self._module = module
        blocks = list(blocks_of(module))
        users = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
        self._own = [[p for p in _frozen(block) if users[id(p)] <= 1] for block in blocks]
        named = {f"{i}.{j}": p for i, own in enumerate(self._own) for j, p in enumerate(own)}
        self._room: Room = offload.room(named)
        self._direct = self._room.direct and device.type == "cpu"
        self._homes = {id(p): self._room.tensors[name] for name, p in named.items()}
        self._in: int | None = None
        with torch.no_grad():
            for parameter in named.values():
                self._take(parameter)
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._before, i))
            block.register_forward_hook(partial(self._after, i))

    def _take(self, parameter: Tensor) -> None:
        home = self._homes[id(parameter)]
        home.copy_(parameter.detach())
        if self._direct:
            parameter.data = home
        else:
            parameter.data = torch.empty_like(home, device=self._device, pin_memory=False)
            parameter.untyped_storage().resize_(0)
        self._room.release(home)

    def _before(self, block: int, module: nn.Module, inputs: Any) -> None:
        self._bring(block)

    def _after(self, block: int, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(self._on_gradient, block))
        self.put_away()

    def _on_gradient(self, block: int, gradient: Tensor) -> None:
        self._bring(block)

    @torch.no_grad()
    def _bring(self, block: int) -> None:
        if self._in == block:
            return
        self.put_away()
        self._in = block
        if self._direct:
            return
        if peek_interpreter_stack() is not None:
            # What it computes has no hooks by which a block would come back for the gradient.
            raise ModelError(
                "learner.offload: a derivative forward, as of MeanFlow, cannot wait for frozen blocks; write none, or "
                "train all weights"
            )
        for parameter in self._own[block]:
            home, memory = self._homes[id(parameter)], parameter.untyped_storage()
            memory.resize_(home.numel() * home.element_size())
            # Through `data`, which has a version of its own: autograd is not to take it for another weight.
            parameter.data.copy_(home, non_blocking=True)

    def put_away(self) -> None:
        """Let no block be in."""
        if self._in is None:
            return
        for parameter in self._own[self._in]:
            if not self._direct:
                parameter.untyped_storage().resize_(0)
            self._room.release(self._homes[id(parameter)])
        self._in = None

    def held(self) -> dict[str, Tensor]:
        """Return where each parameter of the module is kept, by name; with none in, it can be read and written."""
        self.put_away()
        if self._device.type == "cuda":  # a block may still be on its way to the device
            torch.cuda.synchronize(self._device)
        return {name: self._homes.get(id(p), p.detach()) for name, p in self._module.named_parameters()}

    def bind(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights into the module's parameters by name."""
        held, homes = self.held(), {id(home) for home in self._homes.values()}
        with torch.no_grad():
            for name, value in weights.items():
                held[name].copy_(value)
                if id(held[name]) in homes:
                    self._room.release(held[name])


def _frozen(block: nn.Module) -> Iterator[Tensor]:
    """Yield the frozen parameters of a block, and the weights of a base that is stored smaller."""
    yield from (p for p in block.parameters() if not p.requires_grad)
    yield from (part.weight for part in block.modules() if isinstance(part, StoredLinear))


def offload_blocks(module: nn.Module, offload: Offload | None, device: torch.device | str) -> FrozenBlocks | None:
    """Keep the frozen weights of a module's blocks where ``offload`` says, from now on; None where there are none.

    Raises:
        DiskError: the disk has no room for them.
    """
    if offload is None or not any(True for block in blocks_of(module) for _ in _frozen(block)):
        return None
    return FrozenBlocks(module, offload, torch.device(device))
