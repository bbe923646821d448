"""A row of prompts as it is read, and where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flowalign.record.textfiles import TextError

Row = dict[str, Any]


class Place(NamedTuple):
    """Where a row stands: line or row ``number``, from 1, of a file or a data set."""

    file: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}, {self.short}"

    @property
    def short(self) -> str:
        """The line or row alone."""
        return f"{self.unit} {self.number}"


Read = tuple[Place, Row | TextError]  # a row, or in its place what is wrong with it


class Source(NamedTuple):
    """What a source holds: its rows, the names of its columns, and the folder that paths in a row start from, if it has
    one. ``unread`` are columns that no row has, with the kind of what they hold."""

    rows: list[Read]
    columns: list[str]
    folder: Path | None = None
    unread: Mapping[str, str] = {}
