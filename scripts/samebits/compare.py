"""Compares what two checkouts wrote, file by file and fact by fact."""

from __future__ import annotations

import ast
import contextlib
import fnmatch
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samebits.words import Key, Rename, flat, renamed_key, renamed_value

TIMES = ("wall_s", "time/*", "throughput/*")

VOLATILE = (*TIMES, "images_per_s", "pid", "started", "host")

ABSENT = "(absent)"

RECORDS = ("config.yaml", "state.json")  # what a run's configuration stands in

NEWER = "the older checkout has no such key, and the case leaves it at its default"

UNREAD = ("report.html",)  # drawn from metrics that are compared, and holds times


@dataclass(frozen=True)
class Excepted:
    """A fact that may differ: patterns of case, file and key (``fnmatch``), and why; ``added``: that may be new, and
    where both checkouts have it must be the same."""

    case: str
    file: str
    key: str
    why: str
    added: bool = False


@dataclass
class Compared:
    """How a case came out: facts and tensors that are equal, what differs, and the exceptions that were used."""

    files: int = 0
    facts: int = 0
    tensors: int = 0
    differences: list[str] = field(default_factory=list)
    excepted: dict[str, int] = field(default_factory=dict)


def facts(path: Path) -> dict[Key, Any]:
    """Return what a file says, fact by fact.

    These are tensors by name, leaves of JSON and YAML by key, Python without its prose, and the bytes of any other.
    """
    if path.suffix == ".safetensors":
        return _tensors(path)
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in _text(path).splitlines()]
        return {(index, *key): value for index, row in enumerate(rows) for key, value in flat(row)}
    if path.suffix == ".json" or path.name == "latest":
        with contextlib.suppress(json.JSONDecodeError):
            return dict(flat(json.loads(_text(path))))
    if path.suffix == ".yaml":
        import yaml

        return dict(flat(yaml.safe_load(_text(path))))
    if path.suffix == ".py":
        return {("code",): hashlib.sha256(_code(path).encode()).hexdigest()}
    return {("bytes",): hashlib.sha256(path.read_bytes()).hexdigest()}


def _text(path: Path) -> str:
    """The text of a file, with one name for the checkout that wrote it."""
    text, own = path.read_text(), path
    while not (marker := own / ".checkout").exists():
        own = own.parent
    return text.replace(marker.read_text(), "{checkout}")


def _code(path: Path) -> str:
    """Return what a file of Python does: its syntax tree without comments and docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0] = ast.Pass()
    return ast.dump(tree)


def _tensors(path: Path) -> dict[Key, Any]:
    import torch
    from safetensors import safe_open

    found: dict[Key, Any] = {}
    with safe_open(str(path), "pt") as file:
        found |= {("metadata", name): text for name, text in (file.metadata() or {}).items()}
        for name in file.keys():
            tensor = file.get_tensor(name).contiguous()
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            found["tensor", name] = (str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(data).hexdigest())
    return found


def files_of(folder: Path, renames: Sequence[Rename]) -> dict[str, Path]:
    """Every file below ``folder`` by its path there, in the newest words."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or name.startswith(".") or path.is_symlink() or path.name in UNREAD:
            continue
        for rename in renames:
            if rename.kind == "file":
                name = re.sub(rf"(?<![\w.]){re.escape(rename.old)}(?![\w])", rename.new, name)
        found[name] = path
    return found


def compare(
    name: str,
    old: Path,
    new: Path,
    renames: Sequence[Rename],
    exceptions: Sequence[Excepted],
    own: Collection[str] = (),
) -> Compared:
    """Compare what two checkouts have written for the case ``name``.

    ``own`` are the keys that the case's configurations write. Of others a recorded configuration may have more today.
    """
    found = Compared()
    commands = [json.loads((side / ".done.json").read_text()) for side in (old, new)]
    for before, after in zip(*commands, strict=True):
        if before["code"] or after["code"]:
            line, said = " ".join(after["line"]), after["said"] if after["code"] else before["said"]
            found.differences.append(f"`{line}` ended with {before['code']} and now {after['code']}: {said[-300:]}")
    sides = [files_of(side, renames) for side in (old, new)]
    for file in sorted(sides[0].keys() | sides[1].keys()):
        if all(file in side for side in sides):
            found.files += 1
            differ = list(_compare_file(found, sides[0][file], sides[1][file], renames))
        else:
            differ = [("", f"only the {'old' if file in sides[0] else 'new'} checkout writes it")]
        for key, detail in differ:
            newer = _is_newer(file, key, detail, own)
            if (why := NEWER if newer else _reason(name, file, key, detail, exceptions)) is not None:
                found.excepted[why] = found.excepted.get(why, 0) + 1
            else:
                found.differences.append(f"{file}{f': {key}' if key else ''}: {detail}")
    return found


def _is_added(detail: str) -> bool:
    return detail.startswith(f"{ABSENT!r} and now ")


def _is_newer(file: str, key: str, detail: str, own: Collection[str]) -> bool:
    """Tell whether this is a key of a configuration that only the newer checkout records, and no case has written."""
    if Path(file).name not in RECORDS or not _is_added(detail):
        return False
    if Path(file).name == "state.json":
        if not key.startswith("config."):
            return False
        key = key.removeprefix("config.")
    return not any(key == written or key.startswith(f"{written}.") for written in own)


def _reason(case: str, file: str, key: str, detail: str, exceptions: Sequence[Excepted]) -> str | None:
    """Why this may differ; None where nothing says so."""
    for excepted in exceptions:
        if excepted.added and not _is_added(detail):
            continue
        patterns = ((case, excepted.case), (file, excepted.file), (key, excepted.key))
        if all(fnmatch.fnmatch(text, pattern) for text, pattern in patterns):
            return excepted.why
    return None


def _compare_file(found: Compared, old: Path, new: Path, renames: Sequence[Rename]) -> Iterator[tuple[str, str]]:
    """Each key whose facts differ, and how; equal ones are counted in ``found``."""
    both = [_said(path, renames) for path in (old, new)]
    for key in sorted(both[0].keys() | both[1].keys(), key=str):
        if any(fnmatch.fnmatch(str(part), pattern) for part in key for pattern in VOLATILE):
            continue
        values = [side.get(key, ABSENT) for side in both]
        tensor = key[:1] == ("tensor",)
        if _same(*values):
            found.facts += 1
            found.tensors += tensor
        else:
            detail = _distance(old, new, key[1]) if tensor else f"{values[0]!r:.90} and now {values[1]!r:.90}"
            yield ".".join(map(str, key)), detail


def _said(path: Path, renames: Sequence[Rename]) -> dict[Key, Any]:
    said = {}
    records = path.name in RECORDS
    renames = [rename for rename in renames if records or not rename.training]
    for key, value in (manifest(path) if path.name == "MANIFEST.json" else facts(path)).items():
        newest = renamed_key(key, renames)
        said[newest] = renamed_value(newest, value, renames)
    return said


def manifest(path: Path) -> dict[Key, Any]:
    """A checkpoint's manifest; of a file of JSON, which an older checkout writes in other words, whether its hash is
    the file's takes the place of hash and size."""
    content = json.loads(path.read_text())
    content.pop("digest", None)  # of all hashes
    for name, entry in content.get("files", {}).items():
        if name.endswith(".json"):
            entry.pop("bytes", None)
            entry["sha256"] = hashlib.sha256((path.parent / name).read_bytes()).hexdigest() == entry["sha256"]
    return dict(flat(content))


def _same(old: Any, new: Any) -> bool:
    """Equal and of one type: 1 is not 1.0, and NaN is NaN."""
    return type(old) is type(new) and (old == new or (old != old and new != new))


def _distance(old: Path, new: Path, name: str) -> str:
    from safetensors import safe_open

    tensors = []
    for path in (old, new):
        with safe_open(str(path), "pt") as file:
            if name not in file.keys():
                return f"only the {'new' if path is old else 'old'} checkout has it"
            tensors.append(file.get_tensor(name))
    before, after = tensors
    if before.shape != after.shape or before.dtype != after.dtype:
        return f"{tuple(before.shape)} {before.dtype} and now {tuple(after.shape)} {after.dtype}"
    return f"largest difference {(before.double() - after.double()).abs().max():.3g}"
