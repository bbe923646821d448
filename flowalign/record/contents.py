"""Contents of a configuration's paths: a run is compared by them, and finds its files again after a move.

A digest is ``file:…``, ``folder:…``, ``checkpoint:…`` or ``pipeline:<transformer's weights>:<all else>``. Weights other
than a transformer's, and large files, count by their sizes: a digest is made at every start.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flowalign.config.alignment import AlignConfig
from flowalign.config.fields import Resolved, fields_along, marker
from flowalign.config.sections import SHIPPED
from flowalign.config.training import PretrainConfig
from flowalign.record import checkpoint
from flowalign.record.checkpoint import CheckpointError
from flowalign.record.hashing import sha256
from flowalign.record.pipelinefiles import files_read

LARGE = 64 * 2**20
END = 2**20
MANY = 20_000
UNREAD = ("readme.md", "license", "license.md")  # which say nothing of a model
TEXTS = (".json", ".jsonl", ".txt", ".yaml", ".yml", ".py", ".model", ".csv")
ACCEPT = "--accept-changed"  # the option that takes what has changed


def base_hash(model: Path) -> str:
    """Return the sha256 over the transformer's weight files of a pipeline directory."""
    files = sorted((model / "transformer").glob("*.safetensors"))
    return base_hash_of((path.name, sha256(path)) for path in files)


def base_hash_of(weights: Iterable[tuple[str, str]]) -> str:
    """Return `base_hash` of weight files by their names, in their order, and their own hashes."""
    return hashlib.sha256(b"".join(name.encode() + bytes.fromhex(known) for name, known in weights)).hexdigest()


def leaves(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return the dotted keys of all leaves; an empty mapping or list is a leaf."""
    if isinstance(values, dict | list) and values:
        items = values.items() if isinstance(values, dict) else enumerate(values)
        return {k: v for name, value in items for k, v in leaves(value, f"{prefix}{name}.").items()}
    return {prefix[:-1]: values}


def digests(values: Mapping[str, Any]) -> dict[str, str]:
    """Return a digest of what lies at each absolute path of a configuration, by key.

    Names of shipped files are left out.
    """
    found = {}
    for key, value in leaves(values).items():
        place = located(value)
        if _is_written(key) or place is None or SHIPPED in (place[0], *place[0].parents):
            continue
        made = digest_of(place[0])
        if made is not None:
            found[key] = made
    return found


def _is_written(key: str) -> bool:
    """Tell whether a run itself makes what lies at a key's path."""
    fields = [field for run in (AlignConfig, PretrainConfig) for field in fields_along(run, key)]
    return any((path := marker(field, Resolved)) is not None and path.held in ("written", "home") for field in fields)


def located(value: Any) -> tuple[Path, str] | None:
    """Return the absolute path in a value, and what follows it in ``/path/to/file.py:name``.

    It is None where it holds none.
    """
    if not isinstance(value, str) or "\0" in value:
        return None
    file = re.fullmatch(r"(.+\.py)(:[\w.]+)", value)
    path, rest = (Path(file[1]), file[2]) if file else (Path(value), "")
    return (path, rest) if path.is_absolute() and len(path.parts) > 2 else None


def digest_of(path: Path) -> str | None:
    """Return a digest of a path's content, wherever it lies.

    It is None where there is nothing that can be read, or too much of it.
    """
    try:
        if path.is_file():
            return f"file:{_of_file(path)}"
        if (path / "model_index.json").is_file():
            return f"pipeline:{base_hash(path)}:{_of_folder(path, files_read)}"
        if (path / checkpoint.MANIFEST).is_file() or (path / "checkpoints").is_dir():
            return f"checkpoint:{sha256(checkpoint.find(path, None, lambda text: None) / checkpoint.MANIFEST)}"
        return f"folder:{_of_folder(path)}" if path.is_dir() else None
    except (OSError, CheckpointError, TooMany):
        return None


def has_digest(path: Path, digest: str) -> bool:
    """Tell whether a path's content has a digest, as this version makes it or an older one, which took all files of a
    pipeline."""
    made = digest_of(path)
    if made is None or made == digest or base_of(made) is None or base_of(made) != base_of(digest):
        return made == digest
    try:
        return digest == f"pipeline:{base_of(made)}:{_of_folder(path)}"
    except (OSError, TooMany):
        return False


class TooMany(Exception):
    """A folder of more files than are looked at."""


def _of_file(path: Path) -> str:
    size = path.stat().st_size
    if size <= LARGE:
        return sha256(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(END))
        file.seek(-END, os.SEEK_END)
        digest.update(file.read(END))
    return digest.hexdigest()


def _of_folder(folder: Path, read: Callable[[Collection[str]], Collection[str]] = lambda names: names) -> str:
    """Return a hash of names, sizes and small texts in a folder, of the files that are ``read``."""
    digest = hashlib.sha256()
    files = {path.relative_to(folder).as_posix(): path for path in sorted(_files(folder))}
    counted = read(files)
    for name, path in files.items():
        if name in counted:
            size = path.stat().st_size
            held = sha256(path) if path.suffix in TEXTS and size <= END else ""
            digest.update(f"{name}\0{size}\0{held}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """Yield all files but hidden ones, what Python leaves, and those of `UNREAD`."""
    count = 0
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        for name in files:
            if not name.startswith(".") and name.lower() not in UNREAD:
                count += 1
                if count > MANY:
                    raise TooMany
                yield Path(place) / name


def base_of(digest: str | None) -> str | None:
    """Return the hash of the transformer's weights in a pipeline's digest."""
    return digest.split(":")[1] if digest is not None and digest.startswith("pipeline:") else None


def same(before: Any, after: Any, recorded: str | None, run_dir: Path) -> bool:
    """Tell whether two values of one key name the same content, at whatever place.

    ``recorded`` is what the first held when the run was begun. Where nothing was recorded (version 0.1) and the first
    is gone, both must lie at the same place relative to ``run_dir``, before and after a move.
    """
    was, now = located(before), located(after)
    if was is None or now is None or was[1] != now[1]:
        return False
    known = recorded or digest_of(was[0])
    if known is not None:
        return has_digest(now[0], known)
    return digest_of(now[0]) is not None and moved(was[0], run_dir, None) == now[0]


def may_hold_other(before: Any, after: Any) -> bool:
    """Tell whether two values of one key differ in nothing but where they lead: files, folders, and sets that ship."""
    places = [
        (Path(value), "") if isinstance(value, str) and value.startswith("shapes:") else located(value)
        for value in (before, after)
    ]
    was, now = places
    return was is not None and now is not None and was[1] == now[1]


def relocated(values: dict[str, Any], run_dir: Path, began: str | None, held: Mapping[str, str]) -> dict[str, str]:
    """Put new paths into ``values`` for those that lead nowhere since the run directory was moved; returns them by key.

    ``began`` is where the run directory was, ``held`` what its paths held.
    """
    found = {}
    for key, value in leaves(values).items():
        place = located(value)
        if _is_written(key) or place is None or place[0].exists():
            continue
        new = moved(place[0], run_dir, began)
        if new is not None and (held.get(key) is None or has_digest(new, held[key])):
            found[key] = f"{new}{place[1]}"
            put(values, key.split("."), found[key])
    return found


def moved(path: Path, run_dir: Path, began: str | None) -> Path | None:
    """Return the path where ``path`` lies now; None where it is nowhere.

    As far from the run directory as it was, else by the longest end of it that is found in a folder around that.
    """
    here = Path(os.path.abspath(run_dir))
    if began is not None:
        guess = Path(os.path.normpath(here / os.path.relpath(path, began)))
        if guess.exists():
            return guess
    for length in range(len(path.parts) - 1, 0, -1):
        for around in here.parents:
            if (guess := around.joinpath(*path.parts[-length:])).exists():
                return guess
    return None


def put(values: Any, key: list[str], value: str) -> None:
    """Set a value of nested mappings and lists in place, and forget how the old one was written."""
    for part in key[:-1]:
        values = values[int(part) if isinstance(values, list) else part]
    last: Any = int(key[-1]) if isinstance(values, list) else key[-1]
    values[last] = value
    getattr(values, "texts", {}).pop(last, None)
