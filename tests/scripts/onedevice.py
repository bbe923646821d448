"""A device without values beside the CPU: code that mixes the two is refused, as it is on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)  # may have indices on the CPU


class MixedDevices(RuntimeError):
    """Tensors of several devices in one operation."""


class OneDevice(TorchDispatchMode):
    """Let tensors on ``device``, meta, be read as if they had values: numbers are 1, copies on the CPU are all 1 or 0.

    Every other operation on them must have tensors there alone, but for numbers and indices.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device, self.operations = device, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if tensor.device.type == self.device]
        if not here:
            return func(*args, **kwargs)
        self.operations += 1
        packet, to = func.overloadpacket, kwargs.get("device")
        if packet is aten._local_scalar_dense:
            return torch.ones((), dtype=args[0].dtype).item()
        if packet is aten.equal:
            return True
        if packet is aten._to_copy and to is not None and torch.device(to).type == "cpu":
            return _values(args[0], kwargs.get("dtype") or args[0].dtype)
        if packet is aten.copy_:
            into, from_here = args[0], args[1].device.type == self.device
            leaves = from_here and into.device.type != self.device
            return into.copy_(_values(into, into.dtype)) if leaves else into
        others = [tensor for tensor in tensors if tensor.device.type != self.device and tensor.ndim]
        if others and packet not in INDEXED:
            raise MixedDevices(f"{func}: {', '.join(f'{t.device.type} {tuple(t.shape)}' for t in tensors)}")
        if packet in INDEXED:
            lists = (isinstance(arg, list | tuple) for arg in args)
            args = [
                [_moved(each, self.device) for each in arg] if many else arg
                for arg, many in zip(args, lists, strict=True)
            ]
        return func(*args, **kwargs)


def _values(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Make values that are valid whatever they are for: weights of 1, indices of 0."""
    return (torch.ones if dtype.is_floating_point else torch.zeros)(like.shape, dtype=dtype)


def _moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
