"""Embeddings of prompts, and which of them each sample uses.

Shapes: N samples, P distinct prompts, L tokens, D and E widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Embeddings of P distinct prompts, and which of them each of N samples uses.

    ``tokens_PLD`` and ``pooled_PE`` hold one row a prompt; ``index_N`` maps samples to rows;
    ``null_LD`` and ``null_E`` are the unconditional embeddings that guidance needs.
    """

    tokens_PLD: Tensor
    pooled_PE: Tensor
    index_N: Tensor
    null_LD: Tensor
    null_E: Tensor

    def __len__(self) -> int:
        return int(self.index_N.shape[0])

    def take(self, index: Tensor | slice) -> Condition:
        """Return the same prompts for a selection of the samples."""
        return replace(self, index_N=self.index_N[index])

    def expand(self) -> tuple[Tensor, Tensor]:
        """Return tokens (N, L, D) and pooled embeddings (N, E), a row a sample."""
        return self.tokens_PLD[self.index_N], self.pooled_PE[self.index_N]

    def used(self) -> Condition:
        """Return the same samples with the prompts that they use, and no others."""
        rows, index = self.index_N.unique(return_inverse=True)
        return replace(self, tokens_PLD=self.tokens_PLD[rows], pooled_PE=self.pooled_PE[rows], index_N=index)

    def to(self, device: torch.device | str) -> Condition:
        return Condition(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Conditions:
    """Conditions of consecutive chunks, whose prompts stay where they lie: `take` makes one of some of the samples."""

    parts: tuple[Condition, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def take(self, index: Tensor) -> Condition:
        """Return the condition of the samples ``index`` (M,), with copies of the prompts that they use alone."""
        ends = torch.tensor([len(part) for part in self.parts]).cumsum(0)
        part_of = torch.bucketize(index, ends, right=True)
        used = part_of.unique().tolist() or [0]
        made = [self.parts[i].take(index[part_of == i] - (ends[i] - len(self.parts[i]))).used() for i in used]
        return cat_conditions(made).take(part_of.argsort(stable=True).argsort())


def dropped_conditions(condition: Condition, drop_N: Tensor) -> Condition:
    """Return ``condition`` with the empty text for the samples where ``drop_N`` (N,) is True."""
    null_row = condition.tokens_PLD.shape[0]
    return replace(
        condition,
        tokens_PLD=torch.cat([condition.tokens_PLD, condition.null_LD[None]]),
        pooled_PE=torch.cat([condition.pooled_PE, condition.null_E[None]]),
        index_N=torch.where(drop_N.to(condition.index_N.device), null_row, condition.index_N),
    )


def cat_conditions(parts: Sequence[Condition]) -> Condition:
    """Join conditions sample-wise; prompt rows are concatenated, not merged."""
    rows = [len(part.tokens_PLD) for part in parts]
    return replace(
        parts[0],
        tokens_PLD=torch.cat([p.tokens_PLD for p in parts]),
        pooled_PE=torch.cat([p.pooled_PE for p in parts]),
        index_N=torch.cat([part.index_N + sum(rows[:i]) for i, part in enumerate(parts)]),
    )
