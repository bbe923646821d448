"""Tensors of consecutive chunks, indexed by row as if they were one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Rows:
    """The rows of ``torch.cat(parts)``, which is never made: each part stays where it lies.

    ``rows[index]`` and ``rows[index, other, …]`` gather what the joined tensor would give, bit for bit. ``index`` is
    whatever indexes one dimension of a tensor: numbers in any order and with repeats, a mask, a slice. The ``other``
    indices are numbers, or tensors of as many as there are rows. Parts may differ in shape; rows that are gathered
    together do not.
    """

    def __init__(self, parts: Sequence[Tensor | Rows]) -> None:
        self.parts = tuple(tensor for part in parts for tensor in (part.parts if isinstance(part, Rows) else (part,)))
        self._ends = torch.tensor([len(part) for part in self.parts]).cumsum(0)
        first = self.parts[0]
        self.shape = torch.Size((int(self._ends[-1]), *first.shape[1:]))
        self.dtype, self.device = first.dtype, first.device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Tensor:
        first, *others = index if isinstance(index, tuple) else (index,)
        row = torch.arange(len(self))[first]
        part_of = torch.bucketize(row.contiguous(), self._ends, right=True)
        used = part_of.unique().tolist()
        like = self.parts[used[0]] if used else self.parts[0]
        made = torch.empty((*row.shape, *like.shape[1 + len(others) :]), dtype=self.dtype, device=self.device)
        for i in used:
            own, part = part_of == i, self.parts[i]
            within = (row - (self._ends[i] - len(part)), *others)
            made[own] = part[tuple(at[own] if isinstance(at, Tensor) else at for at in within)]
        return made
