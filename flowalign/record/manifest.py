"""MANIFEST.json: what a checkpoint holds, with size and sha256 of each file, whether it does, what else to take."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from flowalign.record.files import stays_below
from flowalign.record.hashing import sha256
from flowalign.record.kinds import read_regular, regular_size
from rewards.missing import hint

FORMAT = "flowalign-checkpoint"
VERSION = 2
READ = (1, 2)  # versions that are read; runs go on from the last alone
LAST_OF_1 = "3344061"  # the last commit that goes on from a checkpoint of version 1
MANIFEST = "MANIFEST.json"
STEP = re.compile(r"step_\d+")


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete, changed or foreign: what, where, what to do."""


def step_of(path: Path) -> int:
    """Return the step of a checkpoint, by its name."""
    return int(path.name.removeprefix("step_"))


def steps(root: Path) -> list[int]:
    """Return the steps of the checkpoints under ``root``, ascending."""
    return sorted(step_of(path) for path in manifests(root))


def verify(path: Path, names: Collection[str] | None = None) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files, or those of ``names`` that it has, have the recorded sha256.

    Raises:
        CheckpointError: manifest or file is missing, unreadable or changed.
    """
    manifest = manifest_of(path)
    for name, recorded in manifest["files"].items():
        if names is None or name in names:
            _check_size(path / name, recorded["bytes"])
            try:
                found = sha256(path / name)
            except OSError as error:
                raise CheckpointError(f"{path / name} cannot be read ({error.strerror})") from error
            if found != recorded["sha256"]:
                raise CheckpointError(f"{path / name} is corrupt (its sha256 is not the recorded one)")
    return manifest


def check_sizes(path: Path) -> None:
    for name, recorded in manifest_of(path)["files"].items():
        _check_size(path / name, recorded["bytes"])


def has_sizes(path: Path) -> bool:
    with suppress(CheckpointError):
        check_sizes(path)
        return True
    return False


def _check_size(path: Path, size: int) -> None:
    try:
        found = regular_size(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    if found != size:
        raise CheckpointError(f"{path} is truncated or has grown")


def manifest_of(path: Path) -> dict[str, Any]:
    """Return the MANIFEST.json of a checkpoint, whole; the files it names are not looked at."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory{hint(path)}")
    try:
        manifest = json.loads(read_regular(path / MANIFEST))
        claimed = manifest.pop("digest")
        found = digest_of(manifest)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} has no readable MANIFEST.json, so it is no checkpoint") from error
    if claimed != found:
        raise CheckpointError(f"{path / MANIFEST} is corrupt")
    if manifest.get("format") != FORMAT or manifest.get("version") not in READ:
        raise CheckpointError(f"{path} is not a {FORMAT} of a version that is known here ({READ[0]} to {VERSION})")
    if outside := [name for name in manifest.get("files", ()) if not stays_below(name)]:
        raise CheckpointError(f"{path / MANIFEST} names {outside[0]}, which lies outside of the checkpoint")
    return manifest


def fault(path: Path) -> str | None:
    """Say what is wrong with the manifest of ``path``."""
    try:
        manifest_of(path)
    except CheckpointError as error:
        return str(error)
    return None


def is_whole(path: Path) -> bool:
    return fault(path) is None


def entries(root: Path) -> list[Path]:
    """Return everything under ``root`` that goes by a checkpoint's name, by step."""
    return sorted((path for path in root.glob("step_*") if STEP.fullmatch(path.name)), key=step_of)


def manifests(root: Path) -> dict[Path, dict[str, Any]]:
    """Return the whole manifests under ``root``, in the order they were written."""
    found = {}
    for path in entries(root):
        with suppress(CheckpointError):
            found[path] = manifest_of(path)
    return dict(sorted(found.items(), key=lambda item: item[1]["sequence"]))


def digest_of(plain: Any) -> str:
    """Return the sha256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@contextmanager
def advised(path: Path) -> Iterator[None]:
    """Add to an error about the checkpoint ``path`` what to take instead."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {advice(path)}") from error


def advice(path: Path) -> str:
    """Say what to do instead: take the newest intact checkpoint beside ``path``."""
    sibling = _intact(path.parent, without=path)
    if sibling is None:
        return f"no other intact checkpoint is beside it: {begin_another(path.parent.parent)}"
    command = going_on(path.parent.parent, without=path)
    train = "" if command is None else f", or train on with `{command}`"
    return f"the newest intact checkpoint beside it is {sibling}: give that{train}"


def going_on(run_dir: Path, without: Path | None = None) -> str | None:
    """Return the command that goes on from the newest intact checkpoint of a run.

    It is None where there is none, or no configuration.
    """
    command, found = _command(run_dir), _intact(run_dir / "checkpoints", without=without, learned="optimizer/")
    if command is None or found is None:
        return None
    return f"{command} checkpoint.resume={found.name}"


def _intact(root: Path, *, without: Path | None, learned: str = "") -> Path | None:
    """Return the newest checkpoint but ``without`` whose files are as recorded and whose state is not destroyed, of
    those with a file named as ``learned``."""
    from flowalign.record.destroyed import fault_of_files

    for path, manifest in reversed(manifests(root).items()):
        with suppress(CheckpointError):
            if path != without and any(name.startswith(learned) for name in manifest["files"]) and verify(path):
                if fault_of_files(path, manifest["files"]) is None:
                    return path
    return None


def begin_another(run_dir: Path) -> str:
    command = _command(run_dir)
    if command is None:
        return "bring one back from a copy, or begin another run"
    own = run_dir.resolve()
    free = next(name for n in count(2) if not own.with_name(name := f"{own.name}-{n}").exists())
    words = [command, shlex.quote(f"name={free}"), *_without_return(run_dir)]
    return f"bring one back from a copy, or begin another run: `{' '.join(words)}`"


def _without_return(run_dir: Path) -> list[str]:
    """Return the option that undoes a return: a new run has no checkpoint to go back to, as this one did."""
    returned = re.search(r"^ *resume: step_", (run_dir / "config.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    return ["checkpoint.resume=auto"] if returned else []


def _command(run_dir: Path) -> str | None:
    """Return the command that trains in ``run_dir``, as it is typed; None where it has no configuration."""
    config = run_dir / "config.yaml"
    try:
        text = read_regular(config).decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    command = "align"
    if re.search(r"^latents:", text, re.MULTILINE):
        command = "distill" if re.search(r"^teacher:(?! *null)", text, re.MULTILINE) else "pretrain"
    return f"flowalign {command} {shlex.quote(str(config))}"
