"""A reward on a folder of images, without a cluster: what ``flowalign try-reward`` does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flowalign.config.section import ConfigError
from flowalign.measure.imagefolder import (
    batches_of_one_size,
    image_files,
    left_out_lines,
    other_pictures,
    own_prompts,
    pixels,
    prompt_rows,
    sizes_of,
)
from flowalign.samples.offers import TRY_REWARD
from rewards.interface import Asked, Checked, Images, InvalidScores, main_key, score_batch, set_up
from rewards.pictures import PictureError
from rewards.printable import printable
from rewards.resolve import resolve

_NAMED = 3  # files of a refusal
_LONGEST_FILE, _SHORTEST_PROMPT = 32, 16
_FOOT: dict[str, Callable[[np.ndarray], float]] = {"mean": np.mean, "lowest": np.min, "highest": np.max}
_CAUSES = {"nan": "NaN", "inf": "infinite", "magnitude": "beyond a million"}


@dataclass(frozen=True)
class Tried:
    """Files with their prompts, and one score a file by reward name, NaN where it was refused; ``source`` is the file
    of the prompts, None where there was none and all are empty."""

    files: list[str]
    prompts: list[str]
    source: Path | None
    scores: dict[str, np.ndarray]
    causes: dict[str, dict[str, int]]
    main: str | None = None
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    def check_judged(self) -> None:
        """Raise InvalidScores where no image has a usable score, or none of the score ``main`` that a run weighs."""
        weighed = self.scores if self.main is None else {self.main: self.scores[self.main]}
        if not any(np.isfinite(values).any() for values in weighed.values()):
            raise InvalidScores(f"no image could be judged ({'; '.join(_refusals(self))})")


def try_reward(
    spec: dict[str, Any], label: str, images: Path, prompts: Path | None, *, device: str = "cpu", batch: int = 32
) -> Tried:
    """Score every image of a folder.

    ``prompts`` is a jsonl file of GenEval-style rows: matched by ``filename`` or ``file`` where all rows have one, else
    in the order of the file names; or a text file with one prompt a line. Left out, the folder's own ``index.json``
    (written by ``flowalign sample``) or ``results.jsonl`` (``flowalign evaluate``) is taken, and without these every
    prompt is empty.

    Raises:
        ConfigError: no images, images or prompts that cannot be read, or numbers that do not fit.
        ScorerError: as the reward raises.
    """
    files = image_files(images, "--images")
    source = prompts or own_prompts(images)
    rows = [{"prompt": ""} for _ in files] if source is None else prompt_rows(files, source)
    sizes, reasons = sizes_of(files)
    _refuse(files, reasons)
    scorer = resolve(spec, Path.cwd(), TRY_REWARD)
    set_up(scorer, device)
    parts: list[tuple[list[int], Checked]] = []
    for indices in batches_of_one_size(sizes, batch):
        pictures = np.stack([_pixels(files, i) for i in indices])
        texts, metadata = [rows[i]["prompt"] for i in indices], [rows[i] for i in indices]
        parts.append((indices, score_batch(label, scorer, Asked(pictures, texts, metadata))))
    names, texts = [file.name for file in files], [row["prompt"] for row in rows]
    scores = _joined(parts, len(files))
    others, main = other_pictures(images), None
    notes = left_out_lines(others, len(files) + len(others), str(images))
    try:
        main = main_key(label, getattr(scorer, "name", None), list(scores))
    except InvalidScores as error:
        notes.append(f"a run would refuse this: {error}")
    return Tried(names, texts, source, scores, _causes(parts), main, tuple(notes), others)


def _pixels(files: list[Path], index: int) -> Images:
    try:
        return pixels(files[index])
    except PictureError as error:
        _refuse(files, {index: str(error)})
        raise


def _refuse(files: list[Path], reasons: dict[int, str]) -> None:
    if reasons:
        named = "; ".join(f"{files[index]} {reason}" for index, reason in list(reasons.items())[:_NAMED])
        more = f" and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else ""
        raise ConfigError("--images", f"{named}{more}; repair or remove what cannot be judged")


def _joined(parts: list[tuple[list[int], Checked]], count: int) -> dict[str, np.ndarray]:
    scores: dict[str, np.ndarray] = {}
    for indices, checked in parts:
        for name, values in checked.scores.items():
            scores.setdefault(name, np.full(count, np.nan))[indices] = values
    return scores


def _causes(parts: list[tuple[list[int], Checked]]) -> dict[str, dict[str, int]]:
    causes: dict[str, Counter[str]] = {}
    for _, checked in parts:
        for name, counts in checked.causes.items():
            causes.setdefault(name, Counter()).update(counts)
    return {name: dict(counts) for name, counts in causes.items() if counts}


def lines_of(tried: Tried, width: int | None = None) -> list[str]:
    """Return the printed table: a line an image, then mean, lowest and highest of each score, and what was refused.

    ``width`` is that of the terminal: prompts are cut to it, never numbers. None cuts nothing.
    """
    from rich.cells import cell_len, set_cell_size

    columns = [["file", *map(printable, tried.files), "", *_FOOT]]
    for name, values in tried.scores.items():
        usable, shown = values[np.isfinite(values)], _formatted(values, "refused" if name in tried.causes else "-")
        foot = [shown(value(usable)) if len(usable) else "" for value in _FOOT.values()]
        columns.append([printable(name), *map(shown, values), "", *foot])
    if width is not None:
        columns[0] = [_cut(text, _LONGEST_FILE) for text in columns[0]]
    sizes = [max(map(cell_len, column)) for column in columns]
    rows = zip(*columns, strict=True)
    lines = ["  ".join([set_cell_size(row[0], sizes[0]), *map(str.rjust, row[1:], sizes[1:])]) for row in rows]
    room = None if width is None else width - cell_len(lines[0]) - 2
    if any(tried.prompts) and (room is None or room >= _SHORTEST_PROMPT):
        prompts = ["prompt", *(printable(" ".join(prompt.split())) for prompt in tried.prompts)]
        for index, prompt in enumerate(prompts):
            lines[index] += "  " + (prompt if room is None else _cut(prompt, room))
    return [line.rstrip() for line in lines] + _refused(tried)


def _refused(tried: Tried) -> list[str]:
    """Return lines on what was refused and why, after an empty line; nothing where nothing was."""
    lines = _refusals(tried)
    return ["", *lines] if lines else []


def _refusals(tried: Tried) -> list[str]:
    """Return a line for each score of which some were refused."""
    lines = []
    for name, counts in tried.causes.items():
        why = ", ".join(f"{count} {_CAUSES.get(cause, cause)}" for cause, count in counts.items())
        lines.append(f"{name}: {sum(counts.values())} of {len(tried.files)} scores refused ({why})")
    return lines


def _formatted(values: np.ndarray, missing: str) -> Callable[[float], str]:
    """Return a function that formats the scores of one reward, all with the same number of digits; ``missing`` stands
    for what is no number."""
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0))
    kind = ".1f" if largest >= 1000 else ".2e" if 0 < largest < 0.01 else ".4f"
    return lambda value: format(value, kind) if np.isfinite(value) else missing


def _cut(text: str, cells: int) -> str:
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= cells else set_cell_size(text, cells - 1).rstrip() + "…"
