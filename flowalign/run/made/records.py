"""Hashes by key and file, how two of them differ, and how that is said."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress

from flowalign.record.hashing import Stamp, stamp
from flowalign.record.pipelinefiles import files_read
from flowalign.run.made.hashing import hash_file
from flowalign.run.made.ingredients import Part, pipeline_parts

LISTED = 1000  # of a key with more files than that, one hash stands for all
ALL, UNREADABLE = "*", "unreadable"

Record = dict[str, dict[str, str]]


def stamp_of(part: Part) -> Stamp | None:
    if part.path is None:
        return None
    try:
        return stamp(part.path)
    except OSError:
        return None


def record_of(parts: Iterable[Part], hash_of: Callable[[Part], str]) -> Record:
    """Return the hashes by key and name."""
    record: Record = {}
    for part in parts:
        record.setdefault(part.key, {})[part.name] = hash_of(part)
    return {key: files if len(files) <= LISTED else {ALL: _together(files)} for key, files in record.items()}


def _together(files: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{files[name]}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def pipeline_difference(
    key: str, was: Mapping[str, str], parts: Sequence[Part], hash_of: Callable[[Part], str]
) -> dict[str, list[str | None]]:
    """Return how the files of a key differ from what was recorded; of a pipeline those that loading it reads.

    Older versions recorded all files of its folders. Where theirs is one hash for all, it counts with them or without.
    """
    known = {part: hash_of(part) for part in parts}
    now = record_of(parts, known.__getitem__).get(key, {})
    index = next((part.path for part in parts if part.name == "model_index.json"), None)
    if index is None or was == now:
        return difference(was, now)
    if ALL not in was:
        return difference(_of_loading(was), _of_loading(now))
    everything = pipeline_parts(key, index.parent, unread=True)
    with_others = record_of(everything, lambda part: known[part] if part in known else hash_now(part))[key]
    return difference(was, with_others)


def _of_loading(files: Mapping[str, str]) -> Mapping[str, str]:
    return files if ALL in files else {name: files[name] for name in files_read(files)}


def hash_now(part: Part) -> str:
    """Return the hash of a file as it is."""
    now = stamp_of(part)
    if part.path is not None and now is not None:
        with suppress(OSError):
            return hash_file(part.path, now)
    return UNREADABLE


def difference(was: Mapping[str, str], now: Mapping[str, str]) -> dict[str, list[str | None]]:
    """Return the hashes before and after, by the name of the file; None where there is none."""
    names = sorted({*was, *now})
    return {name: [was.get(name), now.get(name)] for name in names if was.get(name) != now.get(name)}


def said_of(parts: Sequence[Part], files: Mapping[str, Sequence[str | None]]) -> str:
    """Return ``/models/base/vae/config.json has changed (and 2 more files)``."""
    name, (was, now) = next(iter(files.items()))
    paths = {part.name: str(part) for part in parts}
    if ALL in files:
        return f"a file among the {len(parts)} has changed, been added or gone"
    what = "is gone" if now is None else "is new" if was is None else "has changed"
    more = f" (and {len(files) - 1} more file{'s' * (len(files) > 2)})" if len(files) > 1 else ""
    return f"{paths.get(name, name) or 'the file'} {what}{more}"
