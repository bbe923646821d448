"""Images with captions from HF ``datasets``: what cannot be used is named and left out, never guessed.

A source is a parquet file, a folder of parquet files, what ``save_to_disk`` of ``datasets`` or ``flowalign caption``
has written, JSON Lines that name images, or a folder of images with a metadata.jsonl or metadata.csv; with ``hub``,
what ``datasets.load_dataset`` knows by name. A column of images may hold paths, relative to its file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from flowalign.data.imagecolumn import SHOWN, NoImage, RowFolders, image_of, path_of
from flowalign.data.imagerows import ImagesError, open_images
from flowalign.record.textfiles import kind_of
from rewards.missing import hint
from rewards.picturefiles.kinds import OTHERS, SUFFIXES, is_apple_double

ORIGINAL = "original"  # the kind of caption where a source has one kind
NAMES = ("image", "jpg", "png", "webp")  # of the image column, where its type does not tell
USUAL = ("text", "caption", "prompt")  # columns of captions, where none is named


@dataclass(frozen=True)
class ImageRow:
    """An image file's bytes and its captions by kind. ``number`` counts the rows of the source from 0.

    ``file`` is where the image lies, unless a table holds it.
    """

    number: int
    where: str
    content: bytes
    captions: Mapping[str, str]
    file: Path | None = None


@dataclass(frozen=True)
class Skipped:
    """A row that is left out; ``kind`` is image, caption or duplicate."""

    number: int
    where: str
    kind: str
    reason: str


class ImageSource:
    """The rows of a source in their order, the same ones streamed or not.

    ``captions`` maps kinds of caption, such as original and synthetic, to columns; none: the usual one, or with
    ``captioned=False`` no caption, so that a folder of images needs no metadata. ``instance_prompt`` is the caption of
    every image, in the place of a column. Streamed parquet is read as it lies;
    otherwise ``datasets`` first writes an Arrow copy to its cache.

    Raises:
        ImagesError: the source cannot be read, or has no such column.
    """

    def __init__(
        self,
        source: str,
        captions: Mapping[str, str],
        *,
        image: str | None = None,
        captioned: bool = True,
        instance_prompt: str | None = None,
        streaming: bool = True,
        hub: bool = False,
        split: str = "train",
        limit: int | None = None,
    ) -> None:
        self.source, self._limit = source, limit
        self.reads_elsewhere = False  # a row that was read is of a file that is not the source's own
        self._said = {} if instance_prompt is None else {ORIGINAL: instance_prompt}
        captioned = captioned and not self._said
        opened = open_images(source, captioned or bool(captions), streaming, hub, split)
        self._files, self._folder, self._described = opened.files, opened.folder, opened.described
        self._folders = None if hub else RowFolders(Path(source), self._files)
        self._dataset = opened.dataset
        columns = list(self._dataset.column_names or ())
        self._image = _image_column(self._dataset, columns, image, source)
        usual = [{ORIGINAL: name} for name in USUAL if name in columns] or [{ORIGINAL: USUAL[0]}]
        self.captions = dict(captions) or (usual[0] if captioned else {})
        for kind, column in self.captions.items():
            if column not in columns:
                has = ", ".join(name for name in columns if name != self._image) or "nothing but the image"
                raise ImagesError(f"--caption {kind}={column}: {source} has no such column; it has {has}")
        self._dataset = _undecoded(self._dataset, self._image)

    @property
    def kinds(self) -> list[str]:
        """The kinds of caption that a row has."""
        return [*self._said, *self.captions]

    @property
    def total(self) -> int | None:
        """The number of rows, where it is known without reading them."""
        if hasattr(self._dataset, "__len__"):
            known = len(self._dataset)
        elif self._files:
            from pyarrow.parquet import ParquetFile

            known = sum(ParquetFile(file).metadata.num_rows for file in self._files)
        else:
            return self._limit
        return known if self._limit is None else min(known, self._limit)

    def __iter__(self) -> Iterator[ImageRow | Skipped]:
        """Yield the rows and what takes their place; last, the files of a folder that its metadata does not mention."""
        from datasets.exceptions import DatasetsError

        seen, number = set(), -1
        try:
            for number, row in enumerate(islice(self._dataset, self._limit)):
                found = self._row(row, number)
                if self._folder is not None:
                    seen.add(found.where)
                yield found
        except (DatasetsError, OSError, ValueError) as error:
            at = f"after row {number}" if number >= 0 else "from its beginning"
            raise ImagesError(f"{self.source} cannot be read {at}: {error}") from error
        if self._folder is not None and self._described and self._limit is None:
            yield from _unmentioned(self._folder, seen, number + 1)

    def _row(self, row: Mapping[str, Any], number: int) -> ImageRow | Skipped:
        value = row[self._image]
        path = path_of(value)
        where = f"row {number}" + (f" ({path})" if path and len(path) <= SHOWN else "")
        if self._folder is not None and path:
            where = _relative(Path(path), self._folder)
        inside = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(inside, bytes) and (self._folder is None or Path(where).is_absolute()):
            self.reads_elsewhere = True
        captions = dict(self._said)
        for kind, column in self.captions.items():
            text = row[column]
            if not isinstance(text, str) or not text.strip():
                holds = (
                    "has no caption" if text is None or isinstance(text, str) else f"holds {kind_of(text)}, no text,"
                )
                return Skipped(number, where, "caption", f"{holds} in the column {column}")
            captions[kind] = text
        try:
            found = image_of(value, self._image, () if self._folders is None else self._folders(number))
            content = found if isinstance(found, bytes) else found.read_bytes()
        except NoImage as error:
            missing = f"does not exist{hint(path, typos=False)}" if self._folder is not None and path else ""
            return Skipped(number, where, "image", missing or str(error))
        except OSError as error:
            return Skipped(number, where, "image", f"cannot be opened: {error.strerror or error}")
        return ImageRow(number, where, content, captions, found if isinstance(found, Path) else None)


def _image_column(dataset: Any, columns: Sequence[str], named: str | None, source: str) -> str:
    from datasets import Image as ImageColumn

    typed = [name for name, kind in (dataset.features or {}).items() if isinstance(kind, ImageColumn)]
    found = [name for name in (*([named] if named else (*typed, *NAMES)),) if name in columns]
    if not found:
        asked = f"no column {named!r}" if named else "no column of images; name it with --image"
        raise ImagesError(f"{source} has {asked}; its columns are {', '.join(columns)}")
    return found[0]


def _undecoded(dataset: Any, column: str) -> Any:
    """Return the images as their files' bytes: one that does not decode must not end the run."""
    from datasets import Image as ImageColumn

    if isinstance((dataset.features or {}).get(column), ImageColumn):
        return dataset.cast_column(column, ImageColumn(decode=False))
    return dataset


def _relative(path: Path, folder: Path) -> str:
    own = folder.resolve()
    return path.relative_to(own).as_posix() if path.is_relative_to(own) else str(path)


def _unmentioned(folder: Path, seen: set[str], number: int) -> Iterator[Skipped]:
    files = sorted(path for path in folder.resolve().rglob("*") if path.suffix.lower() in (*SUFFIXES, *OTHERS))
    for path in files:
        if is_apple_double(path):
            continue
        where = _relative(path, folder)
        if where not in seen:
            yield Skipped(number, where, "caption", "has no row in the folder's metadata")
            number += 1
