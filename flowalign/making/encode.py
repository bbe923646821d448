"""Encoding of a source's rows into the shards of a bank: images are cut, gathered by bucket, encoded, written.

What a shard holds is a function of the source and the options alone: neither of the workers nor of interruptions.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from flowalign.data.banks.buckets import Bucket, cut, nearest
from flowalign.data.banks.writer import BankWriter
from flowalign.data.images import ImageRow, ImagesError, ImageSource, Skipped
from flowalign.flow.randomness import Stream, seeded
from flowalign.models.encoders import Encoders
from rewards.pictures import PictureError, read

AHEAD = 4  # rows that are decoded in advance, for each worker
Item = TypeVar("Item")
Result = TypeVar("Result")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """Images of an encoder call and of a shard, where the encoder runs, and how many threads decode."""

    batch: int
    shard: int
    device: str
    workers: int


@dataclass(frozen=True)
class Cut:
    """An image in the size of its bucket, uint8 (H, W, 3)."""

    row: ImageRow
    bucket: Bucket
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class Cutter:
    """Decodes a row and cuts it to its bucket; ``removed`` names the first of their cluster for near-duplicates."""

    buckets: Sequence[Bucket]
    crop: bool
    flip: bool
    seed: int
    removed: Mapping[int, str]

    def __call__(self, row: ImageRow | Skipped) -> Cut | Skipped:
        if isinstance(row, Skipped):
            return row
        if row.number in self.removed:
            said = f"is a near-duplicate of {self.removed[row.number]}"
            return Skipped(row.number, row.where, "duplicate", said)
        try:
            image = read(row.content)
        except PictureError as error:
            return Skipped(row.number, row.where, "image", str(error))
        bucket = nearest(self.buckets, *image.shape[:2])
        drawn = seeded(self.seed, Stream.CUT, row.number) if self.crop or self.flip else None
        return Cut(row, bucket, cut(image, bucket, generator=drawn, crop=self.crop, flip=self.flip))


@dataclass
class Filling:
    """The shard of one bucket while it is not full: rows, images that wait for the encoder, latents (C, h, w)."""

    rows: list[ImageRow] = field(default_factory=list)
    waiting: list[NDArray[np.uint8]] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)

    def add(self, cut: Cut) -> None:
        self.rows.append(ImageRow(cut.row.number, cut.row.where, b"", cut.row.captions))
        self.waiting.append(cut.pixels)

    def encode(self, encoders: Encoders, device: str) -> None:
        if self.waiting:
            images = torch.from_numpy(np.stack(self.waiting)).to(device)
            self.latents += list(encoders.encode_images(images).half().cpu())
            self.waiting.clear()


class Trail:
    """The rows of a source as they come, and the digest of all before any one that a shard may end at.

    Raises:
        ImagesError: the rows behind ``writer.position`` are not those that its shards were made of.
    """

    def __init__(self, source: ImageSource, writer: BankWriter) -> None:
        self._source, self._writer, self._begin = source, writer, writer.position
        self._digest, self._at = RowsDigest(), deque[tuple[int, str]]()

    def rows(self) -> Iterator[ImageRow | Skipped]:
        """Yield the rows that no finished shard is done with."""
        seen = 0
        for row in self._source:
            seen = row.number + 1
            self._digest.add(row)
            if seen >= self._begin:
                self._at.append((seen, str(self._digest)))
            if seen == self._begin and self._writer.source_digest not in (str(self._digest), self._digest.sizes):
                self._refuse()
            if row.number not in self._writer.settled:
                yield row
        if seen < self._begin:
            self._refuse()

    def _refuse(self) -> None:
        raise ImagesError(
            f"{self._source.source} has changed since the bank in {self._writer.directory} was begun; "
            "name another directory"
        )

    @property
    def whole(self) -> str:
        """The digest of all rows, once they were walked."""
        return str(self._digest)

    def digest(self, position: int) -> str:
        while self._at and self._at[0][0] < position:
            self._at.popleft()
        return self._at[0][1]


def encode(source: ImageSource, cutter: Cutter, encoders: Encoders, writer: BankWriter, sizes: Sizes, say: Say) -> str:
    """Write the shards of all rows that no finished shard is done with; returns the digest of all rows.

    Raises:
        ImagesError: nothing can be used, or the source has changed. DiskError.
    """
    filling = {bucket: Filling() for bucket in cutter.buckets}
    trail, position, total = Trail(source, writer), writer.position, source.total
    if writer.entries:
        say(f"going on after {len(writer.entries)} finished shards with {writer.count} images")

    def write(bucket: Bucket) -> None:
        shard, filling[bucket] = filling[bucket], Filling()
        shard.encode(encoders, sizes.device)
        numbers, captions = [row.number for row in shard.rows], [row.captions for row in shard.rows]
        writer.write(torch.stack(shard.latents), numbers, captions, position, trail.digest(position))
        of = "" if total is None else f", {position} of {total} rows"
        say(f"{writer.entries[-1]['file']}: {len(numbers)} images of {bucket}; {writer.count} images{of}")

    for row, found in in_order(cutter, trail.rows(), workers=sizes.workers):
        position = max(position, row.number + 1)
        if isinstance(found, Skipped):
            writer.skip(found)
            continue
        shard = filling[found.bucket]
        shard.add(found)
        if len(shard.waiting) == sizes.batch:
            shard.encode(encoders, sizes.device)
        if len(shard.rows) == sizes.shard:
            write(found.bucket)
    for bucket in cutter.buckets:
        if filling[bucket].rows:
            write(bucket)
    if not writer.count:
        why = "; ".join(f"{row.where} {row.reason}" for row in writer.skipped[:3]) or "it holds no row"
        raise ImagesError(f"{source.source}: none of {len(writer.skipped)} rows can be used ({why})")
    return trail.whole


def in_order(work: Callable[[Item], Result], items: Iterable[Item], *, workers: int) -> Iterator[tuple[Item, Result]]:
    """Yield each item with what ``work`` makes of it, in their order; ``workers`` threads are a little ahead."""
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            ahead.append((item, pool.submit(work, item)))
            if len(ahead) > AHEAD * workers:
                first, future = ahead.popleft()
                yield first, future.result()
        for first, future in ahead:
            yield first, future.result()


class RowsDigest:
    """Tells the rows of a source from others. ``sizes`` knows an image by its size alone, as unfinished banks of
    earlier versions do."""

    def __init__(self) -> None:
        self._whole, self._sizes = hashlib.sha256(), hashlib.sha256()

    def add(self, row: ImageRow | Skipped) -> None:
        said = _said(row)
        self._sizes.update(said)
        self._whole.update(said)
        if isinstance(row, ImageRow):
            self._whole.update(row.content)

    @property
    def sizes(self) -> str:
        return self._sizes.hexdigest()

    def __str__(self) -> str:
        return self._whole.hexdigest()


def _said(row: ImageRow | Skipped) -> bytes:
    """Return the bytes that tell a row from another one, without its image."""
    content = [row.where, row.reason] if isinstance(row, Skipped) else [row.where, str(len(row.content))]
    captions = [] if isinstance(row, Skipped) else [text for pair in sorted(row.captions.items()) for text in pair]
    return "\0".join([str(row.number), *content, *captions, "\n"]).encode("utf-8", "surrogatepass")
