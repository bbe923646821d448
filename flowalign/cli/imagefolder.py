"""Folders of images and their prompts, as commands read them; ``key`` is the option that errors name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowalign.config import ConfigError
from flowalign.textfiles import TextError, kind_of, lines_of, parse_json, read_json, read_rows, read_text
from rewards.interface import Images
from rewards.missing import hint
from rewards.picturekinds import FORMATS, OTHERS, SUFFIXES, is_apple_double
from rewards.pictures import PictureError, look, read

_OWN_PROMPTS = ("index.json", "results.jsonl")

Row = dict[str, Any]
Size = tuple[int, int]


def image_files(folder: Path, key: str) -> list[Path]:
    """The folder's images in the order of their names; raises ConfigError where it is none or has none."""
    if not folder.is_dir():
        raise ConfigError(key, f"{folder} is not a directory{hint(folder)}")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not is_apple_double(path))
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


def other_pictures(folder: Path) -> list[str]:
    """What is said of pictures in formats that are not read and that `image_files` therefore leaves out."""
    names = sorted(
        path.name for path in folder.iterdir() if path.suffix.lower() in OTHERS and not is_apple_double(path)
    )
    return [f"{name} is left out; only {', '.join(FORMATS[:-1])} and {FORMATS[-1]} are read" for name in names]


def sizes_of(files: Sequence[Path]) -> tuple[list[Size | None], dict[int, str]]:
    """(height, width) of each file, upright, as its head says; by index the reasons of those that cannot be read."""
    sizes, reasons = list[Size | None](), dict[int, str]()
    for index, file in enumerate(files):
        try:
            head = look(_content(file))
            sizes.append((head.height, head.width))
        except PictureError as error:
            sizes.append(None)
            reasons[index] = str(error)
    return sizes, reasons


def batches_of_one_size(sizes: Sequence[Size | None], batch: int) -> list[list[int]]:
    """Indices of at most ``batch`` files of one image size; those without a size are left out."""
    by_size: dict[Size, list[int]] = {}
    for index, size in enumerate(sizes):
        if size is not None:
            by_size.setdefault(size, []).append(index)
    return [same[i : i + batch] for same in by_size.values() for i in range(0, len(same), batch)]


def pixels(file: Path) -> Images:
    """The picture of a file, uint8 (H, W, 3); raises PictureError with the reason where it is none."""
    return read(_content(file))


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise PictureError(f"cannot be opened: {error.strerror or error}") from error
