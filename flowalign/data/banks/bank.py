"""A bank of precomputed latents in memory, and what a training step draws from it.

Shapes: M latents of the bank, n of a shard, N of a batch, C h w of a latent, P prompts, L tokens, D and E widths.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from flowalign.conditions import TextRows
from flowalign.data.images import ORIGINAL
from flowalign.flow.randomness import Stream, seeded
from flowalign.types import Condition


class LatentsError(ValueError):
    """A latent bank that is missing, damaged or inconsistent, or that cannot be written."""


@dataclass(frozen=True)
class Mapped:
    """A file that tensors are mapped from: reading them beyond its end kills the process, without a word (SIGBUS)."""

    path: Path
    device: int
    inode: int
    size: int

    @classmethod
    def of(cls, path: Path) -> Mapped:
        """Record the file as it is now, before it is mapped."""
        found = path.stat()
        return cls(path, found.st_dev, found.st_ino, found.st_size)

    def check(self) -> None:
        """Raise LatentsError where the file was cut off since; another one in its place is not the one that is read."""
        try:
            now = os.stat(self.path)
        except OSError:
            return
        if (now.st_dev, now.st_ino) == (self.device, self.inode) and now.st_size < self.size:
            raise LatentsError(
                f"latents: {self.path} has been cut off to {now.st_size} of {self.size} bytes while it was read; "
                "put back what was there"
            )


@dataclass(frozen=True)
class Shard:
    """Latents of one size, (n, C, h, w) float16; for each kind of caption the rows (n,) int64 of their prompts.

    ``noise`` (n, C, h, w) float16 is given where each latent belongs to its own noise, as in the pairs of a reflow.
    """

    latents: Tensor
    rows: Mapping[str, Tensor]
    noise: Tensor | None = None
    file: Mapped | None = None

    def __len__(self) -> int:
        return int(self.latents.shape[0])

    @property
    def size(self) -> tuple[int, int]:
        """(h, w), the bucket."""
        return int(self.latents.shape[-2]), int(self.latents.shape[-1])


@dataclass(frozen=True)
class Drawn:
    """A batch: latents (N, C, h, w) float32, the rows (N,) of their prompts, and their noise, like the latents."""

    latents: Tensor
    rows: Tensor
    noise: Tensor | None = None


@dataclass(frozen=True)
class Embeddings:
    """The text encoders' answers to the bank's prompts, with a T5 part of ``max_sequence_length`` tokens.

    ``table`` has a row a prompt: tokens (P, L, D), pooled (P, E), and the empty prompt's.
    """

    table: Condition
    max_sequence_length: int
    file: Mapped | None = None

    def condition(self, length: int) -> Condition:
        """Return the table with a T5 part of ``length`` tokens.

        Raises:
            LatentsError: the embeddings are shorter than that.
        """
        surplus = self.max_sequence_length - length
        if surplus < 0:
            raise LatentsError(
                f"latents: the embeddings have max_sequence_length {self.max_sequence_length}, the run asks for "
                f"{length}; choose shorter texts or precompute the embeddings again"
            )
        return shortened(self.table, surplus)


def shortened(table: Condition, surplus: int) -> Condition:
    """Return embeddings without the last ``surplus`` of their tokens."""

    def shorter(rows: TextRows) -> TextRows:
        cut = {name: rows[name][:, : rows[name].shape[1] - surplus] for name in ("tokens", "mask") if name in rows}
        return {**rows, **cut}

    return replace(table, text=shorter(table.text), null=shorter(table.null))


class LatentBank:
    """Clean latents of one size or several (buckets), each with a prompt of every kind of caption.

    ``LatentBank(latents, rows, prompts)`` is one of a single size, (M, C, h, w) float16, and a single kind of caption,
    rows (M,); ``of_shards`` has all the rest. ``encoder`` is the hash of what encoded it (``encoder_hash``), if known.
    """

    def __init__(
        self, latents_MCHW: Tensor, prompt_M: Tensor, prompts: Sequence[str], noise_MCHW: Tensor | None = None
    ) -> None:
        self._take((Shard(latents_MCHW, {ORIGINAL: prompt_M}, noise_MCHW),), prompts, None, None)

    @classmethod
    def of_shards(
        cls,
        shards: Sequence[Shard],
        prompts: Sequence[str],
        *,
        embeddings: Embeddings | None = None,
        encoder: str | None = None,
    ) -> LatentBank:
        """Open a bank of at least one shard. All shards have the same kinds of captions, and all have noise or none."""
        bank = cls.__new__(cls)
        bank._take(shards, prompts, embeddings, encoder)
        return bank

    def _take(
        self, shards: Sequence[Shard], prompts: Sequence[str], embeddings: Embeddings | None, encoder: str | None
    ) -> None:
        self.shards, self.prompts = tuple(shards), list(prompts)
        self.embeddings, self.encoder = embeddings, encoder
        self.captions = tuple(self.shards[0].rows)
        self.has_noise = self.shards[0].noise is not None
        for shard in self.shards:
            if set(shard.rows) != set(self.captions) or (shard.noise is not None) != self.has_noise:
                raise LatentsError("latents: the shards of a bank differ in their captions or in having noise")
        self._buckets: dict[tuple[int, int], list[Shard]] = {}
        for shard in self.shards:
            self._buckets.setdefault(shard.size, []).append(shard)

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    @property
    def buckets(self) -> dict[tuple[int, int], int]:
        """The number of latents of each size (h, w)."""
        return {size: sum(len(shard) for shard in shards) for size, shards in self._buckets.items()}

    def draw(self, step: int, batch_size: int, seed: int, captions: Mapping[str, float] | None = None) -> Drawn:
        """Return the batch of a step, all of one size; it is a function of seed and step alone.

        The size is drawn with a probability like its count, the latents uniformly, with replacement. ``captions``
        weights the kinds of caption, drawn for each sample; none takes the first.

        Raises:
            LatentsError: ``captions`` names a kind that the bank lacks, all its weights are 0, or a file was cut off.
        """
        shards = self._bucket_of(step, seed)
        ends = torch.tensor([len(shard) for shard in shards]).cumsum(0)
        index = torch.randint(int(ends[-1]), (batch_size,), generator=seeded(seed, Stream.BANK_ROWS, step))
        kinds = self._kinds_of(step, batch_size, seed, captions or {})
        shape = (batch_size, *shards[0].latents.shape[1:])
        latents, rows = torch.empty(shape), torch.empty(batch_size, dtype=torch.int64)
        noise = torch.empty(shape) if self.has_noise else None
        which = torch.bucketize(index, ends, right=True)
        for number in which.unique().tolist():
            shard, here = shards[number], (which == number).nonzero()[:, 0]
            if shard.file is not None:
                shard.file.check()
            own = index[here] - (ends[number] - len(shard))
            latents[here] = shard.latents[own].float()
            rows[here] = torch.stack([shard.rows[name][own] for name in self.captions])[
                kinds[here], torch.arange(len(own))
            ]
            if noise is not None and shard.noise is not None:
                noise[here] = shard.noise[own].float()
        return Drawn(latents, rows, noise)

    def _bucket_of(self, step: int, seed: int) -> list[Shard]:
        buckets = list(self._buckets.values())
        if len(buckets) == 1:
            return buckets[0]
        counts = torch.tensor(list(self.buckets.values()), dtype=torch.float64)
        return buckets[int(torch.multinomial(counts, 1, generator=seeded(seed, Stream.BANK_SIZE, step)))]

    def _kinds_of(self, step: int, batch_size: int, seed: int, weights: Mapping[str, float]) -> Tensor:
        has = ", ".join(self.captions)
        if unknown := sorted(weights.keys() - set(self.captions)):
            raise LatentsError(f"captions: the bank has no captions {unknown[0]!r}; it has {has}")
        if not weights:
            return torch.zeros(batch_size, dtype=torch.int64)
        shares = torch.tensor([weights.get(name, 0.0) for name in self.captions], dtype=torch.float64)
        if not bool((shares >= 0).all()) or not 0 < float(shares.sum()) < float("inf"):
            raise LatentsError(f"captions: the weights of {has} are {shares.tolist()}; give positive numbers")
        return torch.multinomial(
            shares, batch_size, replacement=True, generator=seeded(seed, Stream.CAPTION_KINDS, step)
        )
