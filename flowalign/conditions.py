"""Embeddings of prompts, and which of them each sample uses.

Shapes: N samples, P distinct prompts, Q distinct negative prompts, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TextRows = Mapping[str, Tensor]
"""Named tensors with a row a prompt; only the model's family knows the names."""


@dataclass(frozen=True)
class Condition:
    """Embeddings of P distinct prompts and of Q negative ones, and which of them each of N samples uses.

    ``text`` holds a row for each prompt, (P, ...) by name, ``null`` the same for the empty or negative prompts, (Q,
    ...), which guidance leads away from. All rows of a name have one shape, those of ``text`` and of ``null`` perhaps
    not the same. ``index_N`` maps samples to rows of ``text``, ``null_N`` to rows of ``null``.
    """

    text: TextRows
    null: TextRows
    index_N: Tensor
    null_N: Tensor

    def __len__(self) -> int:
        return int(self.index_N.shape[0])

    @property
    def num_prompts(self) -> int:
        """P."""
        return count_rows(self.text)

    def take(self, index: Tensor | slice) -> Condition:
        """Return the same prompts for a selection of the samples."""
        return replace(self, index_N=self.index_N[index], null_N=self.null_N[index])

    def expand(self) -> dict[str, Tensor]:
        """Return the embeddings by name, (N, ...), a row a sample."""
        return take_rows(self.text, self.index_N)

    def used(self) -> Condition:
        """Return the same samples with the prompts that they use, and no others."""
        rows, index = self.index_N.unique(return_inverse=True)
        null, null_index = self.null_N.unique(return_inverse=True)
        return Condition(take_rows(self.text, rows), take_rows(self.null, null), index, null_index)

    def to(self, device: torch.device | str) -> Condition:
        """Move all tensors."""
        text, null = ({k: v.to(device) for k, v in rows.items()} for rows in (self.text, self.null))
        return Condition(text, null, self.index_N.to(device), self.null_N.to(device))

    @property
    def negative(self) -> Condition:
        """The same samples with their negative prompts in the place of their own."""
        return replace(self, text=self.null, index_N=self.null_N)

    @property
    def is_even(self) -> bool:
        """Tell whether prompts and negative prompts have rows of the same shapes, so that they fit one batch."""
        return all(self.text[name].shape[1:] == rows.shape[1:] for name, rows in self.null.items())

    def mixed(self, index: Tensor, null: Tensor) -> Condition:
        """Return M samples that use row ``index`` (M,) of the prompts, or, at P and above, of the negative ones.

        ``null`` (M,) names the negative prompt of each.
        """
        return replace(self, text=cat_rows([self.text, self.null]), index_N=index, null_N=null)

    def doubled(self) -> Condition:
        """Return the negative prompt of each sample, then the condition of all of them: 2N samples."""
        own = torch.cat([self.null_N + self.num_prompts, self.index_N])
        return self.mixed(own, torch.cat([self.null_N, self.null_N]))

    def dropped(self, drop_N: Tensor) -> Condition:
        """Return the same samples with their negative prompt where ``drop_N`` (N,) is True."""
        drop_N = drop_N.to(self.index_N.device)
        return self.mixed(torch.where(drop_N, self.null_N + self.num_prompts, self.index_N), self.null_N)


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


def cat_conditions(parts: Sequence[Condition]) -> Condition:
    """Join conditions sample-wise; rows of prompts are concatenated, not merged."""
    index, null, rows, null_rows = [], [], 0, 0
    for part in parts:
        index.append(part.index_N + rows)
        null.append(part.null_N + null_rows)
        rows, null_rows = rows + part.num_prompts, null_rows + count_rows(part.null)
    return Condition(
        cat_rows([part.text for part in parts]),
        cat_rows([part.null for part in parts]),
        torch.cat(index),
        torch.cat(null),
    )


def take_rows(rows: TextRows, index: Tensor | slice) -> dict[str, Tensor]:
    """Return a selection of the rows of every name."""
    return {name: tensor[index] for name, tensor in rows.items()}


def cat_rows(parts: Sequence[TextRows]) -> dict[str, Tensor]:
    """Join rows name by name."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def count_rows(rows: TextRows) -> int:
    """Return the number of rows."""
    return int(next(iter(rows.values())).shape[0])
