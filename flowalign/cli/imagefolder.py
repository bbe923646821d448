"""Folders of images and their prompts, as commands read them; ``key`` is the option that errors name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flowalign.config import ConfigError
from flowalign.textfiles import TextError, kind_of, lines_of, parse_json, read_json, read_rows, read_text
from rewards.interface import Images

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_OWN_PROMPTS = ("index.json", "results.jsonl")

Row = dict[str, Any]


def image_files(folder: Path, key: str) -> list[Path]:
    """The folder's images in the order of their names; raises ConfigError where it is none or has none."""
    if not folder.is_dir():
        raise ConfigError(key, f"{folder} is not a directory")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ConfigError(key, f"{folder} holds no {', '.join(SUFFIXES)} file")
    return files


def own_prompts(folder: Path) -> Path | None:
    """What ``flowalign sample`` or ``flowalign evaluate`` wrote beside the images."""
    return next((folder / name for name in _OWN_PROMPTS if (folder / name).is_file()), None)


def prompt_rows(files: list[Path], source: Path) -> list[Row]:
    """One row with ``prompt`` for each file, in the files' order; raises ConfigError where they do not fit."""
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
        rows = _rows(source)
        if not rows:
            raise TextError(f"{source} holds no rows; write one an image")
        return [_row(row, where) for where, row in rows]
    except TextError as error:
        raise ConfigError("--prompts", str(error)) from error


def _rows(source: Path) -> list[tuple[str, Any]]:
    """Each row with where it stands; a text file has a prompt a line."""
    if source.suffix == ".jsonl":
        return [(f"{source}, line {number}", row) for number, row in read_rows(source, '{"prompt": "a red dog"}')]
    if source.suffix in (".csv", ".tsv"):
        raise TextError(f'{source} is a table; write JSON Lines such as {{"filename": "0.png", "prompt": "a red dog"}}')
    if source.suffix == ".json":
        listed = read_json(source)
        if not isinstance(listed, list):
            raise TextError(f"{source} holds {kind_of(listed)}, not a list of rows")
        return [(f"{source}, row {number}", row) for number, row in enumerate(listed, start=1)]
    return [(f"{source}, line {number}", {"prompt": line}) for number, line in lines_of(read_text(source))]


def _row(row: Any, where: str) -> Row:
    """A row with its prompt; GenEval's results keep the prompt's own row as JSON text under ``metadata``."""
    folded = row.get("metadata") if isinstance(row, dict) else None
    if isinstance(folded, str):
        folded = parse_json(folded, f"{where}, metadata")
    if isinstance(folded, dict):
        row = {**row, **folded}
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise TextError(f'{where} has no "prompt" text')
    return row


def batches_of_one_size(files: list[Path], batch: int, key: str) -> list[list[int]]:
    """Indices of at most ``batch`` files of one image size."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, file in enumerate(files):
        by_size.setdefault(_open(file, lambda picture: picture.size, key), []).append(index)
    return [same[i : i + batch] for same in by_size.values() for i in range(0, len(same), batch)]


def pixels(file: Path, key: str) -> Images:
    """An opaque 8-bit image, uint8 (H, W, 3); raises ConfigError naming the file where it is none."""

    def read(picture: Any) -> np.ndarray:
        if picture.mode.startswith(("I", "F")):
            raise ConfigError(key, f"{file} has more than 8 bits a channel; save it as 8-bit RGB")
        if picture.has_transparency_data and picture.convert("RGBA").getextrema()[3][0] < 255:
            raise ConfigError(key, f"{file} is partly transparent; lay it on a ground and save it without alpha")
        return np.asarray(picture.convert("RGB"))

    return _open(file, read, key)


def _open(file: Path, read: Callable[[Any], Any], key: str) -> Any:
    from PIL import Image

    try:
        with Image.open(file) as picture:
            return read(picture)
    except ConfigError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(key, f"{file} is not a readable image") from error
