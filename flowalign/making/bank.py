"""Encodes a source of captioned images into a latent bank."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.data.banks.buckets import Bucket, BucketError, buckets_of_area, nearest, parse_bucket
from flowalign.data.banks.embeddings import write_embeddings
from flowalign.data.banks.latents import EMBEDDINGS
from flowalign.data.banks.writer import FROM, BankWriter, finished
from flowalign.data.images import ImageRow, ImagesError, ImageSource
from flowalign.making.duplicates import find_duplicates
from flowalign.making.encode import Cutter, RowsDigest, Sizes, encode, in_order
from flowalign.models.build import load_encoders
from flowalign.models.directory import open_directory
from flowalign.models.encoders import Encoders
from flowalign.models.errors import ModelError
from flowalign.models.fingerprint import encoder_hash
from rewards.pictures import PictureError, look

Shape = Callable[[int | None, int | None], tuple[int, int, int]]  # of latents, of an image size in pixels


@dataclass(frozen=True)
class Options:
    """The options of encoding. Sizes are in pixels; ``buckets`` go before ``resolution`` and ``max_ratio``."""

    source: str
    to: Path
    model: ModelConfig
    captions: Mapping[str, str] = field(default_factory=dict)
    instance_prompt: str | None = None
    image: str | None = None
    split: str = "train"
    hub: bool = False
    streaming: bool = True
    limit: int | None = None
    resolution: int | None = None
    max_ratio: float = 1.0
    buckets: tuple[str, ...] = ()
    random_crop: bool = False
    flip: bool = False
    seed: int = 0
    deduplicate: float | None = None
    clip: str | None = None
    embeddings: str | None = None
    batch_size: int = 16
    shard_size: int = 2048
    device: str = "cpu"
    workers: int = 4

    def opened(self) -> ImageSource:
        """Open the source. Raise ImagesError where it cannot be read."""
        return ImageSource(
            self.source,
            self.captions,
            image=self.image,
            instance_prompt=self.instance_prompt,
            streaming=self.streaming,
            hub=self.hub,
            split=self.split,
            limit=self.limit,
        )

    def identity(self, source: ImageSource, encoder: str) -> dict[str, Any]:
        """Return all that decides the bank's content, as plain data."""
        named = ("split", "limit", "resolution", "max_ratio", "random_crop", "flip", "seed", "shard_size")
        own = {name: getattr(self, name) for name in (*named, "deduplicate", "clip", "embeddings")}
        text = {"dtype": self.model.dtype, "max_sequence_length": self.model.max_sequence_length}
        place = self.source if self.hub else str(Path(self.source).resolve())
        columns = {"captions": source.captions, "image": self.image, "buckets": list(self.buckets)}
        said = {} if self.instance_prompt is None else {"instance_prompt": self.instance_prompt}
        return {"source": place, "encoder": encoder, **columns, **own, **text, **said}


def precompute(options: Options, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Write the bank, or what is missing of it; returns its manifest. ``say`` is told of each shard and each warning.

    Raises:
        ConfigError: a size or the directory does not fit. ImagesError: the source cannot be read, or nothing in it can
            be used. LatentsError: the disk is full, or the directory was begun with other options. ModelError.
    """
    source = options.opened()
    encoder = encoder_hash(options.model)
    identity = options.identity(source, encoder)
    files = _files_digest(options)
    if (done := finished(options.to, identity)) is not None:
        _check_unchanged(options, source, files, done.get(FROM) or {})
        say(f"{options.to} is complete already")
        return done
    encoders = load_encoders(options.model).to(options.device)
    shape = open_directory(options.model).latent_shape
    buckets = _buckets(options, shape)
    writer = BankWriter(options.to, identity)
    sizes = Sizes(options.batch_size, options.shard_size, options.device, options.workers)
    with writer.on_full_disk(source.total):
        if options.buckets and not writer.entries:
            _check_listed(source, buckets)
        removed = _duplicates(options, source, writer)
        cutter = Cutter(buckets, options.random_crop, options.flip, options.seed, removed)
        rows = encode(source, cutter, encoders, writer, sizes, say)
        table = _write_captions(options, encoders, list(writer.prompts))
        counts = [{"pixels": str(bucket), "count": _count(writer, shape, bucket)} for bucket in buckets]
        made_from = {"rows": rows} | ({} if files is None or source.reads_elsewhere else {"files": files})
        manifest = writer.finish(source.kinds, encoder, table, {"image_buckets": counts, FROM: made_from})
    for bucket in counts:
        if not bucket["count"]:
            say(f"warning: no image fell into the bucket {bucket['pixels']}")
    return manifest


def _duplicates(options: Options, source: ImageSource, writer: BankWriter) -> Mapping[int, str]:
    """Return the rows that are near-duplicates, each with the earlier one; nothing unless they are asked for."""
    if options.deduplicate is None or options.clip is None:
        return {}
    ordered = partial(in_order, workers=options.workers)
    threshold, clip = options.deduplicate, options.clip
    return find_duplicates(source, threshold, clip, writer.work, device=options.device, ordered=ordered)


def _write_captions(options: Options, encoders: Encoders, prompts: list[str]) -> dict[str, Any] | None:
    """Store the captions' embeddings, where they are asked for; return what the manifest says of them."""
    if options.embeddings is None:
        return None
    dtype, length = getattr(torch, options.embeddings), options.model.max_sequence_length
    return write_embeddings(options.to / EMBEDDINGS, encoders, prompts, length, dtype)


def _files_digest(options: Options) -> str | None:
    """Return a digest of names, sizes and times of a source's files on this machine, except those in the bank
    itself."""
    if options.hub:
        return None
    source, own = Path(options.source).resolve(), options.to.resolve()
    files = [source] if source.is_file() else (path for path in source.rglob("*") if path.is_file())
    listed = [(path, path.stat()) for path in files if not path.is_relative_to(own)]
    said = sorted((path.relative_to(source).as_posix(), stat.st_size, stat.st_mtime_ns) for path, stat in listed)
    return hashlib.sha256(repr(said).encode()).hexdigest()


def _check_unchanged(options: Options, source: ImageSource, files: str | None, made_from: Mapping[str, str]) -> None:
    """Check that the bank is of what the source holds now: by its files' names, sizes and times, else by every byte."""
    if options.hub or "rows" not in made_from or made_from.get("files") == files:
        return
    rows = RowsDigest()
    for row in source:
        rows.add(row)
    if str(rows) != made_from["rows"]:
        raise ImagesError(
            f"--to: {options.source} has changed since the bank in {options.to} was made; name another directory"
        )


def _count(writer: BankWriter, shape: Shape, bucket: Bucket) -> int:
    _, height, width = shape(bucket.height, bucket.width)
    return sum(entry["count"] for entry in writer.entries if entry["bucket"] == f"{height}x{width}")


def _buckets(options: Options, shape: Shape) -> tuple[Bucket, ...]:
    multiple = _multiple(shape)
    factor = multiple // shape(multiple, multiple)[1]
    try:
        if options.buckets:
            return tuple(dict.fromkeys(parse_bucket(text, multiple) for text in options.buckets))
        side = options.resolution or shape(None, None)[1] * factor
        return buckets_of_area(side, options.max_ratio, multiple)
    except BucketError as error:
        raise ConfigError("--bucket" if options.buckets else "--resolution", str(error)) from error


def _multiple(shape: Shape) -> int:
    """Return the smallest side that the model takes; all others are multiples of it."""
    for side in count(1):
        try:
            shape(side, side)
        except ModelError:
            continue
        return side
    raise AssertionError


def _check_listed(source: ImageSource, buckets: tuple[Bucket, ...]) -> None:
    """Check that every bucket that was asked for by name has an image, told from the heads of the files."""
    empty = dict.fromkeys(buckets)
    for row in source:
        if isinstance(row, ImageRow):
            with suppress(PictureError):  # the encoding names it
                head = look(row.content)
                empty.pop(nearest(buckets, head.height, head.width), None)
        if not empty:
            return
    lacking = ", ".join(map(str, empty))
    raise ImagesError(f"--bucket: no image of {source.source} is nearest to {lacking}; leave it out of the list")
