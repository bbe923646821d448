"""Where the values of the trained parameters lie among the ranks of an engine, and how they are put together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Piece(NamedTuple):
    """``length`` values of a parameter from ``begin`` on, which lie in a tensor of a rank from ``offset`` on.

    All three count values of flattened tensors.
    """

    parameter: str
    begin: int
    length: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """The pieces of parameters in each tensor that one rank holds, and the shapes of the parameters, in their order.

    What no piece names is padding. Where ``divided`` is false every rank holds all parameters, each as it is; else the
    pieces of all ranks together are each parameter once.
    """

    shapes: Mapping[str, tuple[int, ...]]
    pieces: Mapping[str, Sequence[Piece]]
    divided: bool

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint records, so that the parameters can be put together from all ranks' tensors."""
        pieces = {name: [list(piece) for piece in own] for name, own in self.pieces.items()} if self.divided else {}
        return {"divided": self.divided, "shapes": {n: list(s) for n, s in self.shapes.items()}, "pieces": pieces}

    def named(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what this rank holds of each parameter, by the parameter's name."""
        return {piece.parameter: values for piece, values in self._views(held)} if self.divided else dict(held)

    def take(self, held: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
        """Copy this rank's pieces out of ``whole`` parameters into the tensors ``held``."""
        with torch.no_grad():
            if not self.divided:
                for name, tensor in held.items():
                    tensor.copy_(whole[name])
                return
            for piece, values in self._views(held):
                flat = whole[piece.parameter].detach().reshape(-1)
                values.copy_(flat[piece.begin : piece.begin + piece.length])

    def _views(self, held: Mapping[str, Tensor]) -> Iterator[tuple[Piece, Tensor]]:
        """Yield each piece with a flat view of its values; no rank holds two pieces of one parameter."""
        for name, tensor in held.items():
            flat = tensor.detach().view(-1)
            for piece in self.pieces[name]:
                yield piece, flat[piece.offset : piece.offset + piece.length]

    def whole(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the whole parameters that the tensors of all ranks hold, float32 on the CPU.

        This is a collective call where they are divided. It aliases nothing it is given.
        """
        if not self.divided:
            return {name: held[name].detach().to("cpu", torch.float32, copy=True) for name in self.shapes}
        device = next(iter(held.values())).device
        own = {piece.parameter: (piece, values) for piece, values in self._views(held)}
        gathered = {}
        for name, shape in self.shapes.items():
            bits = torch.zeros(math.prod(shape), dtype=torch.int32, device=device)
            if name in own:
                piece, values = own[name]
                bits[piece.begin : piece.begin + piece.length] = values.view(torch.int32)
            dist.all_reduce(bits)  # a sum of numbers would lose the sign of a zero
            gathered[name] = bits.view(torch.float32).view(shape).to("cpu")
        return gathered


def undivided(shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """Return the layout of a rank that holds all parameters as they are."""
    return Layout(shapes, {name: [Piece(name, 0, math.prod(shape), 0)] for name, shape in shapes.items()}, False)


def flat_partitions(shapes: Mapping[str, tuple[int, ...]], rank: int, held: Mapping[str, int]) -> Layout:
    """Return ZeRO 1's and 2's: all parameters in a row, of which each rank has the same number of values.

    ``held`` is that number, by the name of the one tensor.
    """
    [(tensor, length)] = held.items()
    pieces, first, begin, end = [], 0, rank * length, (rank + 1) * length
    for name, shape in shapes.items():
        last = first + math.prod(shape)
        own = range(max(first, begin), min(last, end))
        if own:
            pieces.append(Piece(name, own.start - first, len(own), own.start - begin))
        first = last
    return Layout(shapes, {tensor: pieces}, True)


def parameter_partitions(
    shapes: Mapping[str, tuple[int, ...]], rank: int, world_size: int, held: Mapping[str, int]
) -> Layout:
    """Return ZeRO 3's: each rank has the same share of each parameter, in a row in the tensors ``held``, by length.

    Raises:
        ValueError: the shares do not fill the tensors.
    """
    pieces: dict[str, list[Piece]] = {tensor: [] for tensor in held}
    left, tensors, offset = 0, iter(held.items()), 0
    tensor = ""
    for name, shape in shapes.items():
        share = -(-math.prod(shape) // world_size)
        if share > left and not left:
            tensor, left = next(tensors)
            offset = 0
        if share > left:
            raise ValueError(f"partition {tensor!r} ends within a share of {name}")
        begin = min(rank * share, math.prod(shape))
        length = min(share, math.prod(shape) - begin)
        if length:
            pieces[tensor].append(Piece(name, begin, length, offset))
        offset, left = offset + share, left - share
    if left or next(tensors, None) is not None:
        raise ValueError("the shares of all parameters do not fill the partitions")
    return Layout(shapes, pieces, True)


def rows(shapes: Mapping[str, tuple[int, ...]], rank: int, world_size: int) -> Layout:
    """Return FSDP2's: each rank has the same number of rows of each parameter, the last ranks fewer or none."""
    pieces = {}
    for name, (count, *row) in shapes.items():
        share, width = -(-count // world_size), math.prod(row)
        own = range(count)[rank * share : (rank + 1) * share]
        pieces[name] = [Piece(name, own.start * width, len(own) * width, 0)] if own else []
    return Layout(shapes, pieces, True)
