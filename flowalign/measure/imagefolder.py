"""Folders of images and their prompts, as commands read them; ``key`` is the option that errors name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowalign.config.prompts import Prompts, source_of
from flowalign.config.section import ConfigError
from flowalign.data.promptsets import as_section, placed_prompts
from flowalign.data.sources.read import read_file
from flowalign.data.sources.texts import SEPARATORS
from flowalign.record.textfiles import (
    TextError,
    and_more,
    kind_of,
    lines_of,
    parse_json,
    read_json,
    read_rows,
    read_text,
)
from rewards.interface import Images
from rewards.missing import hint
from rewards.picturefiles.kinds import FORMATS, OTHERS, SUFFIXES, is_apple_double
from rewards.pictures import PictureError, look, read

_OWN_PROMPTS = ("index.json", "results.jsonl")
_NAMED = ("filename", "file_name", "file", "image")  # where a row names its image
NAMED = 5  # images that are left out and printed; --json has all
_SHOWN = 3  # of what lies in a folder without pictures
_EXAMPLE = '{"filename": "0.png", "prompt": "a red dog"}'

Row = dict[str, Any]
Size = tuple[int, int]


def image_files(folder: Path, key: str) -> list[Path]:
    """Return the folder's images in the order of their names.

    Raise ConfigError where it is no folder or has no images.
    """
    if not folder.is_dir():
        raise ConfigError(key, f"{folder} is not a directory{hint(folder)}")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not is_apple_double(path))
    if not files:
        raise ConfigError(key, f"{folder} holds no {', '.join(SUFFIXES)} file; {_what_lies_in(folder)}")
    return files


def _what_lies_in(folder: Path) -> str:
    """Return the first few names, each with what it is where that tells why no picture is read."""
    there = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    kinds = {True: " (a folder, which is not looked into)", False: ""}
    named = [
        f"{path.name} (a format that is not read)"
        if path.suffix.lower() in OTHERS
        else path.name + kinds[path.is_dir()]
        for path in there[:_SHOWN]
    ]
    more = f" and {len(there) - _SHOWN} more" if len(there) > _SHOWN else ""
    return f"it holds {', '.join(named)}{more}" if named else "it is empty"


def own_prompts(folder: Path) -> Path | None:
    """Return the prompts that ``flowalign sample`` or ``flowalign evaluate`` wrote beside the images."""
    return next((folder / name for name in _OWN_PROMPTS if (folder / name).is_file()), None)


def prompt_rows(files: list[Path], source: Path | Prompts) -> list[Row]:
    """Return one row with ``prompt`` for each file, in the files' order.

    ``source`` is a file as commands write it, or prompts as a run has them. Rows belong to the files that they name
    under ``filename``, ``file_name``, ``file`` or ``image``, the last where it is not said to be a reference picture.
    Where none names one, the order counts, which must then be the same by text and by number: 2.png stands before
    10.png in one of them.

    Raises:
        ConfigError: rows and files do not fit. PromptsError: prompts cannot be had as a run would have them.
    """
    if isinstance(source, Path):
        return _fitted(files, _read(source), source, _NAMED)
    named = _NAMED[:-1] if "image" in as_section(source).columns else _NAMED
    return _fitted(files, [(str(place), row) for place, row in placed_prompts(source)], source_of(source), named)


def _fitted(files: list[Path], rows: list[tuple[str, Row]], source: Path | str, named: Sequence[str]) -> list[Row]:
    names = [_name(row, where, named) for where, row in rows]
    if not any(names):
        return _in_order(files, [row for _, row in rows], source)
    if not all(names):
        raise ConfigError("--prompts", f"{rows[names.index('')][0]} names no file, and other rows do; name one in each")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ConfigError("--prompts", f"{source} has {times} rows for {name}; give one an image")
    by_name = dict(zip(names, (row for _, row in rows), strict=True))
    missing = [file.name for file in files if file.name not in by_name]
    if missing:
        raise ConfigError("--prompts", f"{source} has no row for {missing[0]} ({len(missing)} images without one)")
    return [by_name[file.name] for file in files]


def _name(row: Row, where: str, named: Sequence[str]) -> str:
    """Return the name of the file that a row is of, or nothing."""
    key = next((key for key in named if row.get(key) not in (None, "")), None)
    if key is None:
        return ""
    if not isinstance(row[key], str):
        raise ConfigError("--prompts", f'{where} has {row[key]!r} under {key!r}; write the file\'s name, as "0.png"')
    return Path(row[key].replace("\\", "/")).name


def _in_order(files: list[Path], rows: list[Row], source: Path | str) -> list[Row]:
    if len(rows) != len(files):
        raise ConfigError(
            "--prompts", f"{source} has {len(rows)} rows for {len(files)} images; give one an image, in their order"
        )
    for one, other in zip(files, sorted(files, key=_by_number), strict=True):
        if one != other:
            raise ConfigError(
                "--prompts",
                f"{source} names no files, and the images have two orders: {one.name} comes before {other.name} by "
                'text and after it by number; name the file in each row: {"filename": "2.png", "prompt": "a red dog"}',
            )
    return rows


def _by_number(file: Path) -> list[tuple[int, str]]:
    """Return a key that sorts names so that 2 comes before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", file.name)]


def _read(source: Path) -> list[tuple[str, Row]]:
    try:
        rows = _rows(source)
        if not rows:
            raise TextError(f"{source} holds no rows; write one an image")
        found, wrong = list[tuple[str, Row]](), list[str]()
        for where, row in rows:
            try:
                found.append((where, _row(row, where)))
            except TextError as error:
                wrong.append(str(error))
        if wrong:
            raise TextError(wrong[0] + and_more(len(wrong) - 1))
        return found
    except TextError as error:
        raise ConfigError("--prompts", str(error)) from error


def _rows(source: Path) -> list[tuple[str, Any]]:
    """Return each row with where it stands; a text file has a prompt a line."""
    suffix = source.suffix.lower()
    if suffix in (".jsonl", ".ndjson", ".jsonlines", ".jl"):
        return [(f"{source}, line {number}", row) for number, row in read_rows(source, _EXAMPLE, _row)]
    if suffix in (*SEPARATORS, ".parquet"):
        return [(str(place), row) for place, row in read_file(source)]
    if suffix in (".yaml", ".yml"):
        raise TextError(f"{source} is YAML; write JSON Lines such as {_EXAMPLE}")
    if suffix == ".json":
        listed = read_json(source)
        if not isinstance(listed, list):
            raise TextError(f"{source} holds {kind_of(listed)}, not a list of rows; JSON Lines have the ending .jsonl")
        return [(f"{source}, row {number}", row) for number, row in enumerate(listed, start=1)]
    lines = list(lines_of(read_text(source)))
    for number, line in lines:
        _check_prompt(line, f"{source}, line {number}", first=number == lines[0][0])
    return [(f"{source}, line {number}", {"prompt": line}) for number, line in lines]


def _check_prompt(line: str, where: str, first: bool) -> None:
    """Raise TextError for a line that is no prompt, but a row of another kind of file."""
    if line.lstrip().startswith("{"):
        try:
            parse_json(line, where)
        except TextError:
            return
        raise TextError(f"{where} is a JSON object; give the file the ending .jsonl")
    columns = [name.strip().strip("\"'").casefold() for name in re.split(r"[,;\t|]", line)]
    if first and any(name in (*_NAMED, "prompt", "caption", "text") for name in columns) and "" not in columns:
        if len(columns) > 1 or columns[0] in ("prompt", "caption", "text"):
            raise TextError(f"{where} is the head of a table; give the file the ending .csv, or write prompts alone")


def _row(row: Any, where: str) -> Row:
    """Return a row with its prompt; GenEval's results keep the prompt's own row as JSON text under ``metadata``."""
    folded = row.get("metadata") if isinstance(row, dict) else None
    if isinstance(folded, str):
        folded = parse_json(folded, f"{where}, metadata")
    if isinstance(folded, dict):
        row = {**row, **folded}
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise TextError(f'{where} has no "prompt" text')
    return row


def other_pictures(folder: Path) -> dict[str, str]:
    """Return the reasons, by name, of pictures in formats that are not read, and that `image_files` leaves out."""
    names = sorted(
        path.name for path in folder.iterdir() if path.suffix.lower() in OTHERS and not is_apple_double(path)
    )
    return dict.fromkeys(names, f"is in a format that is not read; {', '.join(FORMATS[:-1])} and {FORMATS[-1]} are")


def left_out_lines(reasons: Mapping[str, str], total: int, source: str) -> list[str]:
    """Say for people what is left out of ``total`` images: the count and the first few by name.

    It is empty where none is.
    """
    if not reasons:
        return []
    named = [f"  {name} {reason}" for name, reason in reasons.items()]
    rest = [f"  and {len(named) - NAMED} more; --json names all"] if len(named) > NAMED else []
    return [f"left out {len(named)} of {total} images of {source}:", *named[:NAMED], *rest]


def sizes_of(files: Sequence[Path]) -> tuple[list[Size | None], dict[int, str]]:
    """Return (height, width) of each file, upright, as its head says.

    Return also, by index, the reasons of those that cannot be read.
    """
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
    """Yield the indices of at most ``batch`` files of one image size; those without a size are left out."""
    by_size: dict[Size, list[int]] = {}
    for index, size in enumerate(sizes):
        if size is not None:
            by_size.setdefault(size, []).append(index)
    return [same[i : i + batch] for same in by_size.values() for i in range(0, len(same), batch)]


def pixels(file: Path) -> Images:
    """Return the picture of a file, uint8 (H, W, 3). Raise PictureError with the reason where it is none."""
    return read(_content(file))


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise PictureError(f"cannot be opened: {error.strerror or error}") from error
