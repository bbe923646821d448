"""Same-seed images before and after: reads ``samples/iteration_*/`` and pairs the first with the last."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowalign.record.textfiles import TextError, inside, is_there, read_json
from rewards.interface import ScorerError

THUMBNAIL = 256
PIXEL_ART = 128
MOST_IMAGES = 256  # of a set
_SET = re.compile(r"iteration_(\d{1,12})", re.ASCII)


@dataclass(frozen=True)
class Shown:
    """One image as a data URI with its score, and whether it was judged right (None: no verdict of 0 or 1)."""

    uri: str
    score: float | None
    right: bool | None


@dataclass(frozen=True)
class Pair:
    """The images of one prompt and one noise; those ``between`` with their iterations."""

    prompt: str
    tag: str
    before: Shown
    after: Shown | None
    between: tuple[tuple[int, Shown], ...] = ()


@dataclass(frozen=True)
class Gallery:
    """``before`` and ``after`` are iterations; ``after`` is None where only one set of samples exists.

    ``between`` are the iterations of further sets. ``left_out`` is a sentence on what is not shown; empty where all is.
    """

    before: int
    after: int | None
    pairs: list[Pair]
    pixelated: bool
    left_out: str = ""
    between: tuple[int, ...] = ()

    @property
    def judged(self) -> bool:
        """Tell whether any picture has a score."""
        shown = [image for pair in self.pairs for image in (pair.before, pair.after)]
        return any(image is not None and image.score is not None for image in shown)

    def tally(self) -> dict[str, int]:
        """Return how many pairs were and became right; empty where verdicts or a second set are missing."""
        pairs = [(pair.before.right, pair.after.right) for pair in self.pairs if pair.after is not None]
        names = {(False, True): "newly right", (True, True): "right both times", (True, False): "newly wrong"}
        names |= {(False, False): "wrong both times"}
        counts = {name: sum(pair == verdicts for pair in pairs) for verdicts, name in names.items()}
        return counts if sum(counts.values()) else {}


def read_gallery(run_dir: Path, metric: str, between: int = 0) -> Gallery | None:
    """Return the first and the last set of samples, in the order of their index, and up to so many evenly ``between``.

    It is None where there is none.

    What an index names is shown only where it lies inside the run; the run may be somebody else's, and its page may be
    published.

    Raises:
        TextError: an index cannot be understood.
    """
    indices = (run_dir / "samples").glob("iteration_*/index.json")
    named = ((_SET.fullmatch(path.parent.name), path.parent) for path in indices)
    sets = {int(match[1]): folder for match, folder in named if match is not None}
    if not sets:
        return None
    first, *inner = sorted(sets)
    last = inner.pop() if inner else None
    count = min(between, len(inner))
    middle = [inner[(i + 1) * len(inner) // (count + 1) if len(inner) > count else i] for i in range(count)]
    pictures = _Pictures(run_dir, metric)
    earlier = pictures.of(sets[first])
    pixelated = pictures.side <= PIXEL_ART
    later = {} if last is None else pictures.of(sets[last])
    on_the_way = {iteration: pictures.of(sets[iteration]) for iteration in middle}
    pairs = []
    for file, (row, before) in earlier.items():
        same = [(n, found[file]) for n, found in on_the_way.items() if file in found]
        shown = tuple((n, image) for n, (then, image) in same if then["prompt"] == row["prompt"])
        then, after = later.get(file, (row, None))
        after = after if then["prompt"] == row["prompt"] else None
        pairs.append(Pair(row["prompt"], str(row.get("tag") or "").replace("_", " "), before, after, shown))
    return Gallery(first, last, pairs, pixelated, pictures.left_out(), tuple(middle))


class _Pictures:
    """The pictures of a run's samples: those that may be shown, and those that may not."""

    def __init__(self, run_dir: Path, metric: str) -> None:
        self._run_dir, self._metric = run_dir, metric
        self._outside = self._unreadable = 0
        self.side = 0

    def of(self, directory: Path) -> dict[str, tuple[dict[str, Any], Shown]]:
        """Return the pictures by file, in the order of the index."""
        index = directory / "index.json"
        if not inside(index, self._run_dir):
            self._outside += 1
            return {}
        rows = read_json(index)
        if not isinstance(rows, list) or not all(map(_is_row, rows)):
            raise TextError(f"{index} is no list of rows with a file and a prompt; `flowalign align` writes it anew")
        found = {}
        for row in rows[:MOST_IMAGES]:
            file = directory / row["file"]
            if not inside(file, self._run_dir):
                # What is not there any more is passed over; a name that leads out, wherever to, is said.
                self._outside += _leads_out(row["file"]) or is_there(file)
                continue
            try:
                found[row["file"]] = row, self._shown(file, row)
            except (ScorerError, OSError):
                self._unreadable += 1
        return found

    def left_out(self) -> str:
        """Return a sentence on what is left out; empty where all is shown."""
        said = [f"{self._outside} outside of this run"] if self._outside else []
        said += [f"{self._unreadable} that cannot be read as pictures"] if self._unreadable else []
        return f"Left out of what the index names: {' and '.join(said)}." if said else ""

    def _shown(self, file: Path, row: dict[str, Any]) -> Shown:
        uri, side = picture_uri(file.read_bytes())
        self.side = max(self.side, side)
        scores = row.get("scores")
        return shown(uri, scores.get(self._metric) if isinstance(scores, dict) else None)


def picture_uri(data: bytes) -> tuple[str, int]:
    """Return a picture as a data URI, made smaller where it is large, and its longer side.

    Raise ScorerError where it cannot be read.
    """
    from PIL import Image

    from rewards.pictures import look, read

    head, kind = look(data), "png"
    side = max(head.height, head.width)
    if side > THUMBNAIL:
        small = Image.fromarray(read(data))
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=88)
        data, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", side


def shown(uri: str, score: Any) -> Shown:
    """Return a picture with its score; one that is no finite number is none."""
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) < math.inf:
        score = None
    return Shown(uri, score, bool(score) if score in (0, 1) else None)


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("file"), str) and isinstance(row.get("prompt"), str)


def _leads_out(name: str) -> bool:
    return Path(name).is_absolute() or ".." in Path(name).parts
