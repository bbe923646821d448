"""A reward on a folder of images, without a cluster: what ``flowalign try-reward`` does."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowalign.config import ConfigError
from rewards.interface import Checked, InvalidScores, main_key, score_batch, set_up
from rewards.resolve import resolve

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_OWN_PROMPTS = ("index.json", "results.jsonl")
_LONGEST_FILE, _SHORTEST_PROMPT = 32, 16
_FOOT: dict[str, Callable[[np.ndarray], float]] = {"mean": np.mean, "lowest": np.min, "highest": np.max}
_CAUSES = {"nan": "NaN", "inf": "infinite", "magnitude": "beyond a million"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Tried:
    """Files with their prompts, and one score a file by reward name, NaN where it was refused; ``source`` is the file
    of the prompts, None where there was none and all are empty."""

    files: list[str]
    prompts: list[str]
    source: Path | None
    scores: dict[str, np.ndarray]
    causes: dict[str, dict[str, int]]
    note: str = ""


def try_reward(
    spec: dict[str, Any], label: str, images: Path, prompts: Path | None, *, device: str = "cpu", batch: int = 32
) -> Tried:
    """Score every image of a folder.

    ``prompts`` is a jsonl file of GenEval-style rows: matched by ``filename`` or ``file`` where all rows have one, else
    in the order of the file names; or a text file with one prompt a line. Left out, the folder's own ``index.json``
    (written by ``flowalign sample``) or ``results.jsonl`` (``flowalign evaluate``) is taken, and without these every
    prompt is empty.

    Raises:
        ConfigError: no images, prompts that cannot be read, or numbers that do not fit.
        ScorerError: as the reward raises.
    """
    files = _files(images)
    source = prompts or next((images / name for name in _OWN_PROMPTS if (images / name).is_file()), None)
    rows = [{"prompt": ""} for _ in files] if source is None else _rows(files, source)
    scorer = resolve(spec, Path.cwd())
    set_up(scorer, device)
    parts: list[tuple[list[int], Checked]] = []
    for indices in _batches(files, batch):
        pictures = np.stack([_pixels(files[i]) for i in indices])
        texts, metadata = [rows[i]["prompt"] for i in indices], [rows[i] for i in indices]
        parts.append((indices, score_batch(label, scorer, pictures, texts, metadata)))
    names, texts = [file.name for file in files], [row["prompt"] for row in rows]
    scores = _joined(parts, len(files))
    try:
        main_key(label, getattr(scorer, "name", None), list(scores))
        note = ""
    except InvalidScores as error:
        note = f"a run would refuse this: {error}"
    return Tried(names, texts, source, scores, _causes(parts), note)


def _files(images: Path) -> list[Path]:
    if not images.is_dir():
        raise ConfigError("--images", f"{images} is not a directory")
    files = sorted(path for path in images.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ConfigError("--images", f"{images} holds no {', '.join(SUFFIXES)} file")
    return files


def _rows(files: list[Path], source: Path) -> list[Row]:
    """One row with ``prompt`` for each file, in the files' order."""
    rows = _read(source)
    names = [Path(str(row.get("filename") or row.get("file") or "")).name for row in rows]
    if not all(names):
        if len(rows) != len(files):
            raise ConfigError(
                "--prompts", f"{source} has {len(rows)} rows for {len(files)} images; give one an image, in their order"
            )
        return rows
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ConfigError("--prompts", f"{source} has {times} rows for {name}; give one an image")
    by_name = dict(zip(names, rows, strict=True))
    missing = [file.name for file in files if file.name not in by_name]
    if missing:
        raise ConfigError("--prompts", f"{source} has no row for {missing[0]} ({len(missing)} images without one)")
    return [by_name[file.name] for file in files]


def _read(source: Path) -> list[Row]:
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError("--prompts", f"{source} cannot be read ({reason})") from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if source.suffix == ".jsonl":
        rows = [_json(line, f"{source}, line {number},") for number, line in lines]
    elif source.suffix == ".json":
        rows = _json(text, str(source))
    else:
        rows = [{"prompt": line} for _, line in lines]
    if not isinstance(rows, list) or not rows:
        raise ConfigError("--prompts", f"{source} holds no rows; write one an image")
    return [_row(row, f"{source}, row {number},") for number, row in enumerate(rows, start=1)]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError("--prompts", f"{where} is not JSON: {error}") from error


def _row(row: Any, where: str) -> Row:
    """A row with its prompt; GenEval's results keep the prompt's own row as JSON text under ``metadata``."""
    folded = row.get("metadata") if isinstance(row, dict) else None
    if isinstance(folded, str):
        folded = _json(folded, f"{where} metadata")
    if isinstance(folded, dict):
        row = {**row, **folded}
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ConfigError("--prompts", f'{where} has no "prompt" text')
    return row


def _batches(files: list[Path], batch: int) -> list[list[int]]:
    """Indices of at most ``batch`` files of one image size."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, file in enumerate(files):
        by_size.setdefault(_open(file, lambda picture: picture.size), []).append(index)
    return [same[i : i + batch] for same in by_size.values() for i in range(0, len(same), batch)]


def _pixels(file: Path) -> np.ndarray:
    def read(picture: Any) -> np.ndarray:
        if picture.mode.startswith(("I", "F")):
            raise ConfigError("--images", f"{file} has more than 8 bits a channel; save it as 8-bit RGB")
        if picture.has_transparency_data and picture.convert("RGBA").getextrema()[3][0] < 255:
            raise ConfigError("--images", f"{file} is partly transparent; lay it on a ground and save it without alpha")
        return np.asarray(picture.convert("RGB"))

    return _open(file, read)


def _open(file: Path, read: Callable[[Any], Any]) -> Any:
    from PIL import Image

    try:
        with Image.open(file) as picture:
            return read(picture)
    except ConfigError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError("--images", f"{file} is not a readable image") from error


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
    """The table that is printed: a line an image, then mean, lowest and highest of each score, and what was refused.

    ``width`` is that of the terminal: prompts are cut to it, never numbers. None cuts nothing.
    """
    from rich.cells import cell_len, set_cell_size

    columns = [["file", *tried.files, "", *_FOOT]]
    for name, values in tried.scores.items():
        usable, shown = values[np.isfinite(values)], _formatted(values)
        foot = [shown(value(usable)) if len(usable) else "" for value in _FOOT.values()]
        columns.append([name, *map(shown, values), "", *foot])
    if width is not None:
        columns[0] = [_cut(text, _LONGEST_FILE) for text in columns[0]]
    sizes = [max(map(cell_len, column)) for column in columns]
    rows = zip(*columns, strict=True)
    lines = ["  ".join([set_cell_size(row[0], sizes[0]), *map(str.rjust, row[1:], sizes[1:])]) for row in rows]
    room = None if width is None else width - cell_len(lines[0]) - 2
    if any(tried.prompts) and (room is None or room >= _SHORTEST_PROMPT):
        prompts = ["prompt", *(" ".join(prompt.split()) for prompt in tried.prompts)]
        for index, prompt in enumerate(prompts):
            lines[index] += "  " + (prompt if room is None else _cut(prompt, room))
    return [line.rstrip() for line in lines] + _refused(tried)


def _refused(tried: Tried) -> list[str]:
    """What was refused and why, after an empty line; nothing where nothing was."""
    lines = []
    for name, counts in tried.causes.items():
        why = ", ".join(f"{count} {_CAUSES.get(cause, cause)}" for cause, count in counts.items())
        lines.append(f"{name}: {sum(counts.values())} of {len(tried.files)} scores refused ({why})")
    return ["", *lines] if lines else []


def _formatted(values: np.ndarray) -> Callable[[float], str]:
    """How the scores of one reward are written: all with the same number of digits."""
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0))
    kind = ".1f" if largest >= 1000 else ".2e" if 0 < largest < 0.01 else ".4f"
    return lambda value: format(value, kind) if np.isfinite(value) else "refused"


def _cut(text: str, cells: int) -> str:
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= cells else set_cell_size(text, cells - 1).rstrip() + "…"
