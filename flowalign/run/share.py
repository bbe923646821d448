"""The items that one rank learns from: which they are, what networks say of them, and each micro-batch in its turn.

A rank holds no tensors of the others' items: a micro-batch is taken from the batch when it is learned from. Items of
several kinds, which have other image sizes or texts of other lengths, are never in one micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor

from flowalign.algorithm import Algorithm, annotated
from flowalign.types import Credit, TrainBatch, Trajectories


def kinds_of(batch: Any, credit: Credit) -> Tensor | None:
    """Return the number of each item's shape, (M,), where a batch has samples of several.

    The samples of an item, a whole group or a pair, are of one.
    """
    if not isinstance(batch, Trajectories) or len(set(batch.batch.shapes)) < 2:
        return None
    return batch.kinds_N[credit.sample.reshape(len(credit), -1)[:, 0]]


@dataclass(frozen=True)
class Cut:
    """The ``items`` of one update as micro-batches of at most ``size``, for ranks in turn.

    Every rank has as many. Where they do not come out even, the last is there more than once, and counts once. A
    micro-batch has items of one of ``kinds``, the number of each item's shape; a short one is the last of its kind.
    """

    items: Tensor
    size: int
    world_size: int
    kinds: Tensor | None = None

    def _own(self) -> list[Tensor]:
        if self.kinds is None:
            return list(self.items.split(self.size))
        kinds = self.kinds[self.items]
        return [part for kind in kinds.unique() for part in self.items[kinds == kind].split(self.size)]

    def _all(self) -> list[Tensor]:
        found = self._own()
        return found + [found[-1]] * (-len(found) % self.world_size)

    def of(self, rank: int) -> list[Tensor]:
        """Return the micro-batches of a rank."""
        return self._all()[rank :: self.world_size]

    def counts(self) -> list[int]:
        """Return how many items each micro-batch of all ranks counts for, in turn."""
        own = [len(part) for part in self._own()]
        return own + [0] * (-len(own) % self.world_size)


def items_of(cuts: Sequence[Cut], rank: int) -> Tensor:
    """Return the items that a rank learns from in any of the updates ``cuts``, ascending."""
    parts = [part for cut in cuts for part in cut.of(rank)]
    return torch.cat([torch.zeros(0, dtype=torch.long), *parts]).unique()


def asked_of(cuts: Sequence[Cut], rank: int, world_size: int, kind: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the items of a rank, and these again with repetitions: every rank asks networks about as many.

    With a ``kind`` they are those of it; a rank that has none of it asks about another's.
    """
    own = [items_of(cuts, each) for each in range(world_size)]
    if kind is not None:
        assert cuts[0].kinds is not None
        own = [items[cuts[0].kinds[items] == kind] for items in own]
    most, mine = max(map(len, own)), own[rank]
    asked = mine if len(mine) or kind is None else next((items for items in own if len(items)), mine)
    return mine, asked[torch.arange(most).clamp_max(len(asked) - 1)] if len(asked) else asked


@dataclass(frozen=True)
class Said:
    """The items ``index``, ascending, and what the algorithm ``said`` of each, in the same order; their ``batch``."""

    index: Tensor
    said: Mapping[str, Tensor]
    batch: Any


@dataclass(frozen=True)
class RankItems:
    """A rank's items of a batch, with what was said of those of each kind."""

    algorithm: Algorithm
    credit: Credit
    by_kind: Mapping[int, Said]
    kinds: Tensor | None
    device: str

    def minibatch(self, items: Tensor) -> TrainBatch:
        """Take ``items`` of the share, all of one kind, where the network is."""
        own = self.by_kind[0 if self.kinds is None else int(self.kinds[items[0]])]
        row = torch.searchsorted(own.index, items)
        taken = self.algorithm.items(own.batch, self.credit.take(items))
        whole = annotated(taken, {name: tensor[row] for name, tensor in own.said.items()})
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

    def __iter__(self) -> Iterator[TrainBatch]:
        # A sequence's own would take an IndexError from making one for the end, and the step would learn from fewer.
        return (self._share.minibatch(items) for items in self._items)
