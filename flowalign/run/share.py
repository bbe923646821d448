"""The items that one rank learns from: which they are, what networks say of them, and each micro-batch in its turn.

A rank holds no tensors of the others' items: a micro-batch is taken from the batch when it is learned from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor

from flowalign.algorithm import Algorithm, annotated
from flowalign.types import Credit, TrainBatch


@dataclass(frozen=True)
class Cut:
    """The ``items`` of one update as micro-batches of at most ``size``, for ranks in turn; a short one is the last.

    Every rank has as many. Where they do not come out even, the last is there more than once, and counts once.
    """

    items: Tensor
    size: int
    world_size: int

    def _all(self) -> list[Tensor]:
        found = list(self.items.split(self.size))
        return found + [found[-1]] * (-len(found) % self.world_size)

    def of(self, rank: int) -> list[Tensor]:
        """Return the micro-batches of a rank."""
        return self._all()[rank :: self.world_size]

    def counts(self) -> list[int]:
        """Return how many items each micro-batch of all ranks counts for, in turn."""
        own = [len(part) for part in self.items.split(self.size)]
        return own + [0] * (-len(own) % self.world_size)


def items_of(cuts: Sequence[Cut], rank: int) -> Tensor:
    """Return the items that a rank learns from in any of the updates ``cuts``, ascending."""
    parts = [part for cut in cuts for part in cut.of(rank)]
    return torch.cat([torch.zeros(0, dtype=torch.long), *parts]).unique()


def asked_of(cuts: Sequence[Cut], rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Return the items of a rank, and these again with repetitions: every rank asks networks about as many."""
    own = [items_of(cuts, each) for each in range(world_size)]
    most, mine = max(map(len, own)), own[rank]
    return mine, mine[torch.arange(most).clamp_max(len(mine) - 1)] if len(mine) else mine


@dataclass(frozen=True)
class RankItems:
    """A rank's ``index``, ascending, of the items of a batch, and what ``said`` of each, in the same order."""

    algorithm: Algorithm
    batch: Any
    credit: Credit
    index: Tensor
    said: Mapping[str, Tensor]
    device: str

    def minibatch(self, items: Tensor) -> TrainBatch:
        """Take ``items`` of the share, where the network is."""
        row = torch.searchsorted(self.index, items)
        taken = self.algorithm.items(self.batch, self.credit.take(items))
        whole = annotated(taken, {name: tensor[row] for name, tensor in self.said.items()})
        moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in whole.tensors.items()}
        return replace(whole, tensors=moved, condition=whole.condition.used().to(self.device))


class MicroBatches(Sequence[TrainBatch]):
    """Micro-batches of a share, each made when it is asked for."""

    def __init__(self, share: RankItems, items: Sequence[Tensor]) -> None:
        self._share, self._items = share, items

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> TrainBatch: ...

    @overload
    def __getitem__(self, index: slice) -> MicroBatches: ...

    def __getitem__(self, index: int | slice) -> TrainBatch | MicroBatches:
        if isinstance(index, slice):
            return MicroBatches(self._share, self._items[index])
        return self._share.minibatch(self._items[index])
