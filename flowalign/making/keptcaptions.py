"""Captions on disk: a row as soon as it is known, so that what is interrupted goes on and nothing is asked twice."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flowalign.config.section import ConfigError
from flowalign.data.imagerows import CAPTIONS, CARD
from flowalign.data.images import ImageRow, ImagesError, ImageSource, Skipped
from flowalign.making.continued import check_same
from flowalign.record.disk import append_line, draft_of, folder_for, whole_rows, write_text
from flowalign.record.holder import is_of_lock
from flowalign.record.lock import RunLock
from flowalign.record.textfiles import read_object
from rewards.picturefiles.kinds import kind_of

IMAGES = "images"
IMAGE, PROMPT = "image", "prompt"  # by which the readers of prompts and of images know a row


class KeptCaptions:
    """The captions in a folder, begun or finished, which ``lock`` holds; ``asked`` decides what a caption is.

    A row of captions.jsonl names the image's file, relative to ``folder``; an image that a table holds is written into
    ``images``. The rows of a finished set are in the order of the source.

    Raises:
        ConfigError: the folder holds captions that were asked for otherwise, or something else.
    """

    def __init__(self, lock: RunLock, asked: Mapping[str, Any]) -> None:
        self.folder, self._asked = (folder := lock.run_dir), json.loads(json.dumps(asked))
        self._lock = lock
        self._rows_file, self._card = folder / CAPTIONS, folder / CARD
        if self._card.is_file():
            card = read_object(self._card) if self._rows_file.is_file() else self._asked
            check_same("--to", folder, {name: card.get(name) for name in self._asked}, self._asked)
        elif not all(is_of_lock(own.name) for own in folder.iterdir()):
            raise ConfigError("--to", f"{folder} holds something else already; name another directory")
        self.rows = {row[IMAGE]: row for row in whole_rows(self._rows_file)}
        self._left_out = dict[int, tuple[str, str]]()
        self._order = dict[str, int]()
        self._root = folder.resolve()

    def lacking(self, source: ImageSource) -> Iterator[ImageRow]:
        """Yield the images of a source that have no caption.

        Raises:
            ImagesError: the source cannot be read, or a row of a table has another image than when it was captioned.
        """
        for row in source:
            if not isinstance(row, ImageRow):
                self.leave_out(row, row.reason)
                continue
            name = self._name(row)
            if not name.isascii() and name != name.encode("utf-8", "ignore").decode():
                self.leave_out(row, "has a name that is not UTF-8")
            elif name not in self._order:  # rows may share a file
                self._order[name] = row.number
                if name not in self.rows:
                    yield row
                elif row.file is None:
                    self._check_same_image(name, row.content, source)

    @property
    def settled(self) -> int:
        """How many images have a caption, or were left out."""
        return len(self.rows) + len(self._left_out)

    @property
    def left_out(self) -> dict[str, str]:
        """The reason for each image that has no caption, in the order of the source."""
        return dict(said for _, said in sorted(self._left_out.items()))

    def leave_out(self, row: ImageRow | Skipped, reason: str) -> None:
        """Say why an image has no caption."""
        self._left_out[row.number] = (row.where.encode("utf-8", "backslashreplace").decode(), reason)

    def add(self, row: ImageRow, text: str) -> None:
        """Keep a caption: before the first one what was asked for, and before each an image that a table holds.

        Raises:
            DiskError: the disk does not take it. LockLost: another process has taken the folder over.
        """
        self._lock.check()
        self._lock.begun = True
        name = self._name(row)
        if not self.rows:
            self._write_card({})
        if row.file is None:
            self._write_image(name, row.content)
        self.rows[name] = {IMAGE: name, PROMPT: text, **row.captions}
        append_line(self._rows_file, _line(self.rows[name]))

    def finish(self) -> dict[str, Any]:
        """Put the rows into the order of the source, and return the card, which is written where there is a caption.

        Raises:
            DiskError: the disk does not take it. LockLost: as `add`.
        """
        self._lock.check()
        ordered = sorted(self.rows.values(), key=lambda row: self._order.get(row[IMAGE], math.inf))
        if ordered != list(self.rows.values()):
            write_text(self._rows_file, "".join(f"{_line(row)}\n" for row in ordered))
        return self._write_card({"captions": len(self.rows), "left_out": self.left_out})

    def _name(self, row: ImageRow) -> str:
        if row.file is not None:
            return Path(os.path.relpath(row.file, self._root)).as_posix()
        return f"{IMAGES}/{row.number:08}.{kind_of(row.content).lower()}"

    def _write_image(self, name: str, content: bytes) -> None:
        with folder_for(self.folder / IMAGES), draft_of(self.folder / name, len(content)) as draft:
            draft.write_bytes(content)

    def _check_same_image(self, name: str, content: bytes, source: ImageSource) -> None:
        """Raise ImagesError where a row of a table has another image than the one that was captioned."""
        if not (self.folder / name).is_file():
            self._write_image(name, content)
        elif (self.folder / name).read_bytes() != content:
            raise ImagesError(
                f"--to: {source.source} has changed since the captions in {self.folder} were begun; "
                "name another directory"
            )

    def _write_card(self, more: Mapping[str, Any]) -> dict[str, Any]:
        card = {**self._asked, **more}
        if more.get("captions", 1):
            with folder_for(self.folder):
                write_text(self._card, json.dumps(card, indent=1, ensure_ascii=False) + "\n")
        return card


def _line(row: Mapping[str, str]) -> str:
    return json.dumps(row, ensure_ascii=False)
