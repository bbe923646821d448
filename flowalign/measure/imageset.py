"""A set of images that is measured: read batch by batch, and what cannot be read is left out, counted and named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flowalign.config.section import ConfigError
from flowalign.measure.features import BATCH, Batches
from flowalign.measure.imagefolder import batches_of_one_size, left_out_lines, other_pictures, pixels, sizes_of
from rewards.pictures import PictureError


@dataclass
class Pictures:
    """Images of ``source`` by place; ``left_out`` says of some why they are not among the ``batches``.

    A damaged one may only be found when its batch is read. ``others`` are pictures that have no place, and why.
    """

    source: str
    names: Sequence[str]
    batches: Callable[[], Batches]
    left_out: dict[int, str] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)

    @property
    def kept(self) -> list[int]:
        return [place for place in range(len(self.names)) if place not in self.left_out]

    @property
    def count(self) -> int:
        return len(self.names) - len(self.left_out)

    @property
    def reasons(self) -> dict[str, str]:
        """The reason why an image is left out, by its name."""
        return {self.names[place]: reason for place, reason in sorted(self.left_out.items())} | dict(self.others)

    def lines(self) -> list[str]:
        """Say for people what was left out: the count and the first few by name."""
        return left_out_lines(self.reasons, len(self.names) + len(self.others), self.source)


def folder_of(files: Sequence[Path], key: str) -> Pictures:
    """Return the files of one folder. Raise ConfigError that names ``key`` where none of them can be read."""
    sizes, left_out = sizes_of(files)
    folder = files[0].parent

    def batches() -> Batches:
        for places in batches_of_one_size(sizes, BATCH):
            found: dict[int, np.ndarray] = {}
            for place in places:
                try:
                    found[place] = pixels(files[place])
                except PictureError as error:
                    left_out[place] = str(error)
            if found:
                yield list(found), np.stack(list(found.values()))
        check_any()

    def check_any() -> None:
        if len(left_out) == len(files):
            first = min(left_out)
            raise ConfigError(key, f"none of {len(files)} images can be read ({files[first]} {left_out[first]})")

    check_any()
    return Pictures(str(folder), [file.name for file in files], batches, left_out, other_pictures(folder))
