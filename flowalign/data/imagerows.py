"""Sources of images, opened by what they are; what ``datasets`` reads otherwise or not at all is made one of its own.

pandas and Arrow, by which it reads tables, take ``NA`` for nothing and a column of captions such as ``7`` for numbers.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowalign.data.captiontable import IMAGE, read_tables, tables_of
from flowalign.data.folders import pictures_of, visible
from flowalign.data.sources.folder import JSON_LINES, TRAIN
from flowalign.data.sources.saved import SAVED_SPLITS, is_saved, saved_split
from flowalign.record.textfiles import TextError, read_rows, read_text
from rewards.missing import hint

CAPTIONS, CARD = "captions.jsonl", "captions.json"  # of a folder that `flowalign caption` wrote
METADATA = ("jsonl", "csv")
FORMS = "a parquet file, a saved data set, or a folder of parquet files or of images with a metadata.jsonl"
_EXAMPLE = '{"image": "photos/0.jpg", "prompt": "a red dog"}'


class ImagesError(ValueError):
    """A source of images that is missing or malformed, or of which nothing can be used."""


@dataclass(frozen=True)
class Opened:
    """A source's data set; its parquet files or the ``folder`` of its images, where it is made of such.

    ``described`` says that a folder's metadata has the rows, so that an image may lack one.
    """

    dataset: Any
    files: Sequence[Path] = ()
    folder: Path | None = None
    described: bool = False


def open_images(source: str, captioned: bool, streaming: bool, hub: bool, split: str) -> Opened:
    """Open a source by what it is. Raise ImagesError."""
    from datasets.exceptions import DatasetsError

    path = Path(source)
    try:
        if hub:
            return Opened(_load(source, split, streaming))
        if not path.exists():
            raise ImagesError(f"{path} does not exist{hint(path)}; give {FORMS} (a data set on the hub needs --hub)")
        if (lines := _lines_that_name_images(path)) is not None:
            return Opened(_of_lines(lines))
        if is_saved(path):
            one = split == TRAIN and not (path / SAVED_SPLITS).is_file()
            return Opened(saved_split(path, None if one else split))
        if files := [path] if path.is_file() else visible(path, "*.parquet"):
            return Opened(_load("parquet", split, streaming, patterns_of(files)), files)
        if not captioned:
            return Opened(_of_pictures(path), folder=path)
        if not _check_described(path):
            return Opened(_of_tables(path, split), folder=path, described=True)
        # All files of a folder are one split: by itself `datasets` takes test_b.png and val/ for others.
        files_of_it = patterns_of([path], "/**")
        return Opened(_load("imagefolder", split, streaming, files_of_it), folder=path, described=True)
    except ImagesError:
        raise
    except TextError as error:
        raise ImagesError(str(error)) from error
    except (DatasetsError, OSError, ValueError) as error:
        raise ImagesError(f"{source} cannot be read: {error}") from error


def patterns_of(paths: Sequence[Path | str], below: str = "") -> list[str]:
    """Return patterns that match these paths and nothing else: ``datasets`` reads every path as a pattern.

    Raises:
        ImagesError: a path that it cannot be told.
    """
    for path in map(str, paths):
        if "::" in path or "://" in path:
            raise ImagesError(f"{path} has `::` or `://` in its name, which is read as an address; rename it")
    return [glob.escape(str(path)) + below for path in paths]


def _load(name: str, split: str, streaming: bool, files: Sequence[str] = ()) -> Any:
    from datasets import load_dataset

    where: dict[str, Any] = {"data_files": {split: files}} if files else {}
    return load_dataset(name, split=split, streaming=streaming, **where)


def _check_described(folder: Path) -> bool:
    """Tell whether a folder's images are described by a metadata.jsonl, else by tables.

    Raises:
        ImagesError: by neither. TextError: a description is no text.
    """
    described = {kind: list(folder.rglob(f"metadata.{kind}")) for kind in METADATA}
    if not any(described.values()):
        raise ImagesError(
            f"{folder} holds neither parquet files nor images with a metadata.jsonl or metadata.csv; write their "
            "captions there, or give all of them one: --instance-prompt TEXT"
        )
    for file in (file for files in described.values() for file in files):
        read_text(file)
    return bool(described["jsonl"])


def _of_tables(folder: Path, split: str) -> Any:
    """Return the rows of a folder's metadata.csv; every cell is text. Raise TextError where one is malformed."""
    return _dataset(read_tables(tables_of(folder, list(folder.rglob("metadata.csv")), split)), IMAGE)


def _lines_that_name_images(source: Path) -> Path | None:
    """Return the JSON Lines that a source is, or that a folder of captions holds; None for any other source."""
    if (source / CAPTIONS).is_file() and (source / CARD).is_file():
        return source / CAPTIONS
    return source if source.suffix.lower() in JSON_LINES and source.is_file() else None


def _of_lines(file: Path) -> Any:
    """Return the rows of JSON Lines, of which only texts are kept. Raise TextError where one is malformed."""
    rows = [row for _, row in read_rows(file, _EXAMPLE)]
    names = dict.fromkeys(name for row in rows for name in row)
    return _dataset({name: [_text(row.get(name)) for row in rows] for name in names}, None)


def _of_pictures(folder: Path) -> Any:
    """Return a row for each picture below a folder, in the order of paths. Raise TextError where there is none."""
    found = [str(path) for path in pictures_of(folder.resolve())]
    if not found:
        raise TextError(f"{folder} holds neither images nor parquet files, not in its folders either")
    return _dataset({IMAGE: found}, IMAGE)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _dataset(columns: Mapping[str, Sequence[str | None]], image: str | None) -> Any:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn

    kinds = {name: ImageColumn(decode=False) if name == image else Value("string") for name in columns}
    return Dataset.from_dict(dict(columns), features=Features(kinds))
