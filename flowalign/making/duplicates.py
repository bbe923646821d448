"""Near-duplicates: rows of a source that resemble an earlier one, by the features of an open_clip model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from flowalign.data.banks.files import write_json, write_tensors
from flowalign.data.duplicates import near_duplicates
from flowalign.data.images import ImageRow, ImageSource
from rewards.models.openclip import OpenClip
from rewards.pictures import PictureError, read

CHUNK = 1024  # images whose features lie in a file


def find_duplicates(
    source: ImageSource,
    threshold: float,
    clip: str,
    work: Path,
    *,
    device: str = "cpu",
    ordered: Callable[..., Iterator[tuple[ImageRow, Tensor | None]]],
) -> dict[int, str]:
    """Return, for each row that is to be removed, the name of the first of its cluster.

    It is kept in ``work`` once it is known.

    ``ordered(work, rows)`` maps rows in their order, side by side. Features are kept as well, so that an interrupted
    search goes on.

    Raises:
        SpecError: ``clip`` is no directory in open_clip's layout. DiskError.
    """
    done = work / "duplicates.json"
    if not done.is_file():
        model = OpenClip("--clip", path=clip)
        model.setup(device)
        rows, names = _features(source, model, work, ordered)
        features = torch.cat([chunk for chunk, _ in rows]) if rows else torch.empty(0, 1)
        numbers = [number for _, chunk in rows for number in chunk]
        first = near_duplicates(features.to(device), threshold) if rows else np.arange(0)
        removed = {numbers[i]: names[numbers[k]] for i, k in enumerate(first.tolist()) if i != k}
        write_json(done, removed)
    found: Mapping[str, str] = json.loads(done.read_text(encoding="utf-8"))
    return {int(number): name for number, name in found.items()}


def _features(
    source: ImageSource,
    model: OpenClip,
    work: Path,
    ordered: Callable[..., Iterator[tuple[ImageRow, Tensor | None]]],
) -> tuple[list[tuple[Tensor, list[int]]], dict[int, str]]:
    """Return the unit features (n, D) with the numbers of their rows, chunk by chunk, and the names of all of them."""
    chunks, names = _kept(work)
    last = max(names, default=-1)
    waiting: list[tuple[ImageRow, Tensor]] = []

    def write() -> None:
        with torch.inference_mode():
            features = model.embed(torch.cat([pixels for _, pixels in waiting])).cpu()
        own = {row.number: row.where for row, _ in waiting}
        path = work / f"features-{len(chunks):05d}.safetensors"
        write_tensors(path, {"features": features}, {"names": json.dumps(own)})
        chunks.append((features, list(own)))
        names.update(own)
        waiting.clear()

    def pixels_of(row: ImageRow) -> Tensor | None:
        try:
            return model.pixels(read(row.content)[None])
        except PictureError:
            return None  # the encoding names it

    rows = (row for row in source if isinstance(row, ImageRow) and row.number > last)
    for row, pixels in ordered(pixels_of, rows):
        if pixels is not None:
            waiting.append((row, pixels))
        if len(waiting) == CHUNK:
            write()
    if waiting:
        write()
    return chunks, names


def _kept(work: Path) -> tuple[list[tuple[Tensor, list[int]]], dict[int, str]]:
    chunks, names = [], {}
    while (path := work / f"features-{len(chunks):05d}.safetensors").is_file():
        with safe_open(path, framework="pt") as file:
            own = {int(number): name for number, name in json.loads(file.metadata()["names"]).items()}
            chunks.append((file.get_tensor("features"), list(own)))
        names |= own
    return chunks, names
