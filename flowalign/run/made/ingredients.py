"""Ingredients of a run: every file, by the key of the configuration that leads to it and by its name within that.

Names do not depend on where things lie, so that a run can be moved. Shipped prompts, which the package makes and
nobody reads, bring their hash along; so do the files of banks and checkpoints, whose hashes are written beside them and
checked by whoever loads them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowalign.algorithm import Needs
from flowalign.algorithms import build_algorithm
from flowalign.config.alignment import AlignConfig
from flowalign.config.fields import Held, paths_in
from flowalign.config.prompts import HUB, SHAPES, Prompts, PromptsConfig, source_of
from flowalign.config.run import RunConfig
from flowalign.config.sections import PATH_OPTIONS, ModelConfig, RewardConfig
from flowalign.config.teachers import TeacherConfig
from flowalign.data.promptsets import load_prompts
from flowalign.record import checkpoint
from flowalign.record.checkpoint import CheckpointError
from flowalign.record.contents import UNREAD, leaves
from flowalign.record.manifest import digest_of
from flowalign.record.pipelinefiles import files_read
from flowalign.record.textfiles import TextError, read_object
from flowalign.shapes import prompts as shapes
from rewards.resolve import location_of
from rewards.usercode.imports import SUFFIXES, files_of_code


@dataclass(frozen=True)
class Part:
    """A file of ``key``, ``name`` within it (``""`` for what the key itself names); ``known`` is its hash, if known."""

    key: str
    name: str
    path: Path | None = None
    known: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.path is not None else self.name


Wanted = Callable[[str], bool]
_Source = tuple[str, Callable[[], Iterator[Part]]]


def parts_of(config: RunConfig, base_dir: Path, wanted: Wanted = lambda key: True) -> Iterator[Part]:
    """Yield all parts whose key is ``wanted``; what is not there is left out, as loading it says more of that."""
    for key, parts in _sources(config, base_dir):
        if wanted(key):
            yield from parts()


def is_manifest(part: Part) -> bool:
    """Tell whether a file is a bank's manifest, whose ``known`` is of what it says and which is read once."""
    from flowalign.data.banks.latents import MANIFEST

    return part.key.endswith("latents") and part.name == MANIFEST


def _sources(config: RunConfig, base_dir: Path) -> Iterator[_Source]:
    """Yield what finds the parts of each path that is read, by its key."""
    algorithm = build_algorithm(config.algorithm)
    unread = _unread(config, algorithm.needs)
    yield from _of_code("algorithm.type", str(config.algorithm["type"]).partition(":")[0])
    paths = [*paths_in(config), *paths_in(algorithm.config, "algorithm.")]
    written = [os.path.abspath(value) for _, value, held, _ in paths if held == "written"]
    for key, value, held, section in paths:
        if key.startswith(unread):
            continue
        if isinstance(section, ModelConfig):
            yield from _of_code(f"{key.removesuffix('path')}type", section.type or "")
        if isinstance(section, RewardConfig):
            yield from _of_reward(key, value, held, section, base_dir)
        elif held == "pipeline":
            yield _source(key, pipeline_parts, Path(value))
        elif held == "teacher":
            yield _source(key, _teacher, value, section)
        elif held == "bank":
            yield _source(key, _bank, value)
        elif held == "prompts":
            asked = section if isinstance(section, PromptsConfig) else value
            yield _source(key, _prompts, asked, getattr(section, "num_samples", None))
        elif held in ("files", "shipped"):
            yield _source(key, _path, value, written)


def _unread(config: RunConfig, needs: Needs) -> tuple[str, ...]:
    """Return the keys of paths that this run does not read, or the beginnings of such."""
    unread = () if config.evaluation.every else ("evaluation.",)
    if not isinstance(config, AlignConfig):
        return unread if needs.features else (*unread, "features")
    return unread if config.data.preferences is None else (*unread, "data.prompts")


def _source(key: str, find: Callable[..., Iterator[Part]], *args: Any) -> _Source:
    return key, lambda: find(key, *args)


def _of_code(key: str, location: str) -> Iterator[_Source]:
    if "." in location:
        yield _source(key, _code, location)


def _of_reward(key: str, value: Any, held: Held, reward: RewardConfig, base_dir: Path) -> Iterator[_Source]:
    """Yield the user's code, what it is given beside it, or the models that its options name."""
    if held == "code":
        location = location_of(reward.spec)
        if location is not None:
            yield _source(key, _code, location, base_dir)
        for name, path in leaves(reward.runtime_env or {}).items():
            if name.partition(".")[0] in ("working_dir", "py_modules") and isinstance(path, str):
                yield _source(f"{key.removesuffix('spec')}runtime_env.{name}", _python, base_dir / path)
    if held == "options":
        for name, path in leaves(value).items():
            if name.rpartition(".")[2] in PATH_OPTIONS and isinstance(path, str):
                yield _source(f"{key}.{name}", _path, base_dir / path)


def _path(key: str, path: str | Path, but: Sequence[str] = ()) -> Iterator[Part]:
    """Yield a file, or all files of a folder ``but`` those of some folders in it."""
    path = Path(path)
    if path.is_file():
        yield Part(key, "", path)
        return
    for file in files_under(path):
        if not any(Path(folder) in Path(os.path.abspath(file)).parents for folder in but):
            yield Part(key, file.relative_to(path).as_posix(), file)


def _python(key: str, path: Path) -> Iterator[Part]:
    return (part for part in _path(key, path) if part.path is not None and part.path.name.endswith(SUFFIXES))


def _code(key: str, location: str, base_dir: Path = Path(".")) -> Iterator[Part]:
    return (Part(key, name, file) for name, file in files_of_code(location, base_dir).items())


def pipeline_parts(key: str, root: Path, *, unread: bool = False) -> Iterator[Part]:
    """Yield the files that loading a pipeline reads; with ``unread`` also the others beside them.

    These are its index, what an export of ours says of itself, and in the folders of its parts `files_read`.
    """
    try:
        index = read_object(root / "model_index.json")
    except TextError:
        yield from _path(key, root)
        return
    for name in ("model_index.json", "flowalign.json"):
        if (root / name).is_file():
            yield Part(key, name, root / name)
    for name in sorted(name for name, value in index.items() if isinstance(value, list) and any(value)):
        files = {file.relative_to(root).as_posix(): file for file in files_under(root / name)}
        read = files if unread else files_read(files)
        yield from (Part(key, file, path) for file, path in files.items() if file in read)


def _teacher(key: str, path: str, teacher: TeacherConfig) -> Iterator[Part]:
    if (Path(path) / "model_index.json").is_file():
        yield from pipeline_parts(key, Path(path))
        return
    with suppress(CheckpointError, OSError):
        found = checkpoint.find(Path(path), None, lambda text: None)
        name = f"{teacher.weights}.safetensors"
        recorded = checkpoint.manifest_of(found)["files"].get(name)
        if recorded is not None:
            yield Part(key, name, found / name, recorded["sha256"])


def _bank(key: str, path: str) -> Iterator[Part]:
    """Yield the files that the manifest of a bank names, as it has them; loading a bank holds them against it."""
    from flowalign.data.banks.latents import MANIFEST

    root = Path(path)
    try:
        manifest = read_object(root / MANIFEST)
        entries = [*manifest["shards"], manifest["prompts"], *filter(None, [manifest["embeddings"]])]
        found = [Part(key, str(e["file"]), root / str(e["file"]), str(e["sha256"])) for e in entries]
        facts = [manifest["captions"], [(entry.get("count"), entry.get("max_sequence_length")) for entry in entries]]
        yield from (*found, Part(key, MANIFEST, root / MANIFEST, digest_of(facts)))
    except (TextError, KeyError, TypeError):
        yield from _path(key, root)


def _prompts(key: str, prompts: Prompts, samples: int | None = None) -> Iterator[Part]:
    """Yield a file or the files of a folder, or the rows that the package makes or the hub has.

    An evaluation of ``samples`` has a set of shipped ones of its own.
    """
    source = source_of(prompts)
    if source.startswith(HUB):
        yield Part(key, source, None, digest_of(load_prompts(prompts)))
    elif not source.startswith(SHAPES):
        yield from _path(key, source)
    elif source in ("shapes:train", "shapes:eval"):
        if source == "shapes:eval" and samples is not None:
            rows = shapes.evaluation_set(samples)
        else:
            rows = shapes.prompts("train" if source == "shapes:train" else "eval")
        yield Part(key, source, None, digest_of(rows))


def files_under(folder: Path) -> Iterator[Path]:
    """Yield all regular files, links followed, but hidden ones, what Python leaves, and what says nothing of a
    model."""
    walked: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        here = os.stat(place)
        if (here.st_dev, here.st_ino) in walked:  # a link that leads around
            folders.clear()
            continue
        walked.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(files):
            if name.startswith(".") or name.lower() in UNREAD:
                continue
            path = Path(place) / name
            with suppress(OSError):
                if stat.S_ISREG(os.stat(path).st_mode):
                    yield path
