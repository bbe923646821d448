"""Same-seed images before and after: reads ``samples/iteration_*/`` and pairs the first with the last."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

THUMBNAIL = 256
PIXEL_ART = 128


@dataclass(frozen=True)
class Shown:
    """One image as a data URI with its score, and whether it was judged right (None: no verdict of 0 or 1)."""

    uri: str
    score: float | None
    right: bool | None


@dataclass(frozen=True)
class Pair:
    prompt: str
    tag: str
    before: Shown
    after: Shown | None


@dataclass(frozen=True)
class Gallery:
    """``before`` and ``after`` are iterations; ``after`` is None where only one set of samples exists."""

    before: int
    after: int | None
    pairs: list[Pair]
    pixelated: bool


def read_gallery(samples: Path, metric: str) -> Gallery | None:
    """The first and the last set of samples, in the order of their index; None where there is none."""
    found = sorted(path.parent for path in samples.glob("iteration_*/index.json"))
    if not found:
        return None
    first, last = found[0], found[-1] if len(found) > 1 else None
    after = {} if last is None else {row["file"]: row for row in _index(last)}
    pairs, sides = [], []
    for row in _index(first):
        then = after.get(row["file"])
        if then is not None and then["prompt"] != row["prompt"]:
            then = None
        before, side = _shown(first, row, metric)
        later = None if last is None or then is None else _shown(last, then, metric)[0]
        pairs.append(Pair(row["prompt"], str(row.get("tag") or "").replace("_", " "), before, later))
        sides.append(side)
    number = [int(path.name.removeprefix("iteration_")) for path in (first, last or first)]
    return Gallery(number[0], None if last is None else number[1], pairs, max(sides, default=0) <= PIXEL_ART)


def _index(directory: Path) -> list[dict[str, Any]]:
    """Rows whose image exists."""
    rows = json.loads((directory / "index.json").read_text(encoding="utf-8"))
    return [row for row in rows if (directory / row["file"]).is_file()]


def _shown(directory: Path, row: dict[str, Any], metric: str) -> tuple[Shown, int]:
    from PIL import Image

    from rewards.pictures import look, read

    data, kind = (directory / row["file"]).read_bytes(), "png"
    head = look(data)
    side = max(head.height, head.width)
    if side > THUMBNAIL:
        small = Image.fromarray(read(data))
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=88)
        data, kind = buffer.getvalue(), "jpeg"
    score = row.get("scores", {}).get(metric)
    right = bool(score) if score in (0, 1) else None
    return Shown(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", score, right), side
