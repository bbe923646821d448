"""Preference pairs from disk: every image and caption is encoded once, and what cannot be used is left out by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from flowalign.config.alignment import AlignConfig
from flowalign.data.banks.cache import EncodedCache
from flowalign.data.banks.files import write_json
from flowalign.data.folders import visible
from flowalign.data.imagecolumn import NoImage, RowFolders, content_of
from flowalign.data.imagerows import patterns_of
from flowalign.data.images import Skipped
from flowalign.data.pairsampler import Pair, PairSampler
from flowalign.engine import process_group
from flowalign.models.encoders import Encoders
from flowalign.record.disk import DiskError
from rewards.missing import hint
from rewards.pictures import PictureError

SKIPPED = "skipped.json"
MOST_LEFT_OUT = 0.25  # of the pairs; beyond it the set is broken, not blemished
NAMED = 3  # rows of a sentence

COLUMNS = ("jpg_0", "jpg_1", "label_0", "label_1", "caption")


class PreferencesError(ValueError):
    """A preference set that is missing, malformed, or without a single preference."""


@dataclass(frozen=True)
class Row:
    """One labelled pair; ``winner`` 0 or 1 is the preferred image, None a tie. ``number`` counts rows from 0."""

    number: int
    images: tuple[bytes, bytes]
    caption: str
    winner: int | None


def check_source(source: Path) -> None:
    """Raise PreferencesError, without reading a pair, unless ``source`` is a set with all columns."""
    _open(source)


def read_rows(source: Path) -> Iterator[Row | Skipped]:
    """Yield the pairs of a parquet file or a folder, in order, images as their files' bytes.

    It also yields what takes their place.

    The columns are Pick-a-Pic v2's; a label is 1 for the preferred image, 0 for the other, and equal ones are a tie.
    A folder holds parquet files, or images and a metadata.jsonl with ``jpg_0_file_name`` and ``jpg_1_file_name``. A row
    without a caption or an image is skipped; a column of images may hold paths, relative to its file.

    Raises:
        PreferencesError: with the row.
    """
    from datasets.exceptions import DatasetsError

    dataset, folders = _open(source), RowFolders(source, _files(source))
    number = -1
    try:
        for number, row in enumerate(dataset):
            yield _row(row, number, source, folders(number))
    except PreferencesError:
        raise
    except (DatasetsError, OSError, ValueError) as error:
        at = f"after row {number}" if number >= 0 else "from its beginning"
        raise PreferencesError(f"data.preferences: {source} cannot be read {at}: {error}") from error


def _files(source: Path) -> list[Path]:
    return [source] if source.is_file() else visible(source, "*.parquet")


def _count(source: Path) -> int:
    """Count the rows of the set, without reading an image."""
    from pyarrow.parquet import ParquetFile

    files = _files(source)
    return sum(ParquetFile(file).metadata.num_rows for file in files) if files else sum(1 for _ in _open(source))


def _open(source: Path) -> Any:
    """Open the set as a stream, so that no second copy of it is written."""
    from datasets import Image, load_dataset
    from datasets.exceptions import DatasetsError

    if not source.exists():
        raise PreferencesError(
            f"data.preferences: {source} does not exist{hint(source)}; give a parquet file or a folder of pairs"
        )
    files = _files(source)
    if not files and not any((source / f"metadata.{kind}").is_file() for kind in ("jsonl", "csv")):
        raise PreferencesError(
            f"data.preferences: {source} holds neither parquet files nor images with a metadata.jsonl"
        )
    try:
        where: dict[str, Any] = {"data_files": {"train": patterns_of(files) if files else patterns_of([source], "/**")}}
        dataset: Any = load_dataset("parquet" if files else "imagefolder", split="train", streaming=True, **where)
    except (DatasetsError, OSError, ValueError) as error:
        raise PreferencesError(f"data.preferences: {source} cannot be read: {error}") from error
    missing = [name for name in COLUMNS if name not in (dataset.column_names or ())]
    if missing:
        raise PreferencesError(
            f"data.preferences: {source} has no column {missing[0]!r}; a preference set has {', '.join(COLUMNS)}"
        )
    for name in COLUMNS[:2]:
        if isinstance((dataset.features or {}).get(name), Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    return dataset


def _row(row: dict[str, Any], number: int, source: Path, folders: Sequence[Path]) -> Row | Skipped:
    labels, caption = (row["label_0"], row["label_1"]), row["caption"]
    said = f"data.preferences: {source}, row {number} has the"
    if any(not isinstance(label, int | float) or label != label for label in labels):
        raise PreferencesError(f"{said} labels {labels[0]!r} and {labels[1]!r}, no numbers")
    if caption is not None and not isinstance(caption, str):
        raise PreferencesError(f"{said} caption {caption!r}, which is no text")
    if caption is None or not caption.strip():
        return Skipped(number, f"row {number}", "caption", "has no caption")
    images = []
    for name in COLUMNS[:2]:
        try:
            images.append(content_of(row[name], name, folders))
        except NoImage as error:
            return Skipped(number, f"row {number}", "image", str(error))
    winner = None if labels[0] == labels[1] else int(labels[1] > labels[0])
    return Row(number, (images[0], images[1]), caption, winner)


def load_pairs(config: AlignConfig, encoders: Encoders | None, *, rank: int = 0, world_size: int = 1) -> PairSampler:
    """Return the sampler of a run. With ``encoders`` it first encodes what no earlier run has encoded.

    Pairs without a caption or with an image that cannot be read are left out and named in the cache's ``skipped.json``.

    Raises:
        PreferencesError: the set is missing or malformed, all of its pairs are ties, or more than `MOST_LEFT_OUT` of
            them cannot be used.
        NotEncoded: without encoders, something is not on disk.
    """
    source, folder = _places(config)
    cache = EncodedCache(folder, encoders, config.model, config.device)
    if world_size > 1 and encoders is not None:
        # Each rank its own share first, so that they need not all encode everything.
        for row in islice(read_rows(source), rank, None, world_size):
            _encode(row, cache)
    total, ties = _count(source), 0
    pairs, skipped = list[Pair](), list[Skipped]()
    for found in (_encode(row, cache) for row in read_rows(source)):
        if isinstance(found, Skipped):
            skipped.append(found)
            _refuse_many(skipped, total, source)
        elif found is None:
            ties += 1
        else:
            pairs.append(found)
    if not pairs:
        what = f"all {ties} pairs of {source} are ties" if ties else f"{source} holds no pair"
        raise PreferencesError(f"data.preferences: {what}; there is nothing to learn from")
    if rank == 0:
        _record(folder / SKIPPED, skipped)
    count, seed = config.data.groups_per_iteration, config.seed
    return PairSampler(pairs, cache, count=count, seed=seed, ties=ties, skipped=len(skipped))


def check_shared(pairs: PairSampler) -> None:
    """Raise PreferencesError unless all ranks hold the same pairs; a collective call."""
    if not process_group.alike(pairs.digest):
        raise PreferencesError("data.preferences: the ranks see different pairs; give every machine the same files")


def left_out(config: AlignConfig) -> str | None:
    """Return a sentence about the pairs that a run left out when it loaded them; None where there are none."""
    if config.data.preferences is None:
        return None
    source, folder = _places(config)
    try:
        rows = json.loads((folder / SKIPPED).read_text(encoding="utf-8"))
    except OSError:
        return None
    return f"left out {len(rows)} preference pairs of {source} ({_named(rows)}); see {folder / SKIPPED}"


def _places(config: AlignConfig) -> tuple[Path, Path]:
    """Return the path of the set, and the folder of what is encoded of it."""
    assert config.data.preferences is not None
    return Path(config.data.preferences), Path(config.data.preferences_cache or f"{config.data.preferences}.cache")


def _encode(row: Row | Skipped, cache: EncodedCache) -> Pair | Skipped | None:
    if isinstance(row, Skipped) or row.winner is None:
        return row if isinstance(row, Skipped) else None
    keys = []
    for i, content in enumerate(row.images):
        try:
            keys.append(cache.image(content))
        except PictureError as error:
            return Skipped(row.number, f"row {row.number}, jpg_{i}", "image", str(error))
    return keys[row.winner], keys[1 - row.winner], cache.caption(row.caption)


def _refuse_many(skipped: Sequence[Skipped], total: int, source: Path) -> None:
    if len(skipped) > MOST_LEFT_OUT * total:
        raise PreferencesError(
            f"data.preferences: more than {MOST_LEFT_OUT:.0%} of the {total} pairs of {source} cannot be used "
            f"({_named([vars(row) for row in skipped])}); repair the set"
        )


def _named(rows: Sequence[dict[str, Any]]) -> str:
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return "; ".join(f"{row['where']} {row['reason']}" for row in rows[:NAMED]) + more


def _record(path: Path, skipped: Sequence[Skipped]) -> None:
    """Keep the list beside what was encoded; a folder that nobody may write to goes without."""
    with suppress(OSError, DiskError):
        if skipped:
            write_json(path, [vars(row) for row in skipped])
        else:
            path.unlink(missing_ok=True)
