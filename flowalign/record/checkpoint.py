"""Checkpoints of a run directory: atomic, hashed, and never half there.

``root`` is ``runs/<name>/checkpoints``. A checkpoint is written into a hidden directory, synced, renamed to
``step_000020``; only then is ``latest``, a text file with that name, replaced by rename. It is a hint for people: the
newest checkpoint is the whole one with the highest ``sequence`` in its manifest. ``last_good``, another such file,
names the newest checkpoint from before an alarm.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flowalign.record.disk import BLOCK
from flowalign.record.kinds import read_regular
from flowalign.record.log import LOG
from flowalign.record.manifest import (
    MANIFEST,
    STEP,
    VERSION,
    CheckpointError,
    advice,
    advised,
    begin_another,
    check_sizes,
    entries,
    fault,
    is_whole,
    manifest_of,
    manifests,
    step_of,
    verify,
)
from flowalign.record.manifest import steps as steps
from rewards.missing import hint

LATEST = "latest"
LAST_GOOD = "last_good"
HIDDEN = ".tmp-"
SPARE = 16 * BLOCK  # of a checkpoint: its manifest, directories and ``latest``
BUFFERS = "buffers"  # in a state: a hash of what the network's files hold beside its parameters
T = TypeVar("T")
Say = Callable[[str], object]
OptimizerState = tuple[Mapping[str, Tensor], Mapping[str, Any]]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as ``load`` read it: weights by name, optimizer tensors and facts by rank, the run's own state.

    ``averages`` are those beside ``ema``, by the name of their file. ``version`` is that of how it was written.
    """

    path: Path
    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer_by_rank: dict[int, OptimizerState]
    state: dict[str, Any]
    averages: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    version: int = VERSION

    def optimizer_of(self, rank: int) -> OptimizerState:
        """Return the optimizer state for ``rank``; without ZeRO all ranks hold the same, so a new rank gets rank 0's.

        Raises:
            CheckpointError: none was saved.
        """
        if not self.optimizer_by_rank:
            raise CheckpointError(f"{self.path} holds no optimizer state, which training on needs")
        return self.optimizer_by_rank[rank if rank in self.optimizer_by_rank else 0]


def content_hash(weights: Mapping[str, Tensor]) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def has_any(root: Path) -> bool:
    """Tell whether checkpoints were written under ``root``, be they whole or not."""
    return (root / LATEST).exists() or bool(entries(root))


@dataclass(frozen=True)
class Newest(Generic[T]):
    """The newest intact checkpoint, and what was made of it."""

    path: Path
    made: T


def newest(root: Path, check: Callable[[Path], T], say: Say = LOG.warning) -> Newest[T] | None:
    """Return the checkpoint that was written last of those in which ``check`` finds no fault.

    It is None where there is none at all.

    ``latest`` is but a hint: ``say`` gets one line where it is missing or names another one, or where newer ones were
    passed over.

    Raises:
        CheckpointError: there are checkpoints, or ``latest`` speaks of some, and none is intact.
    """
    faults: dict[Path, str] = {}
    for path in _newest_first(root):
        try:
            made = check(path)
        except CheckpointError as error:
            faults[path] = str(error)
            continue
        older = {p for p in faults if step_of(p) < step_of(path) and not is_whole(p)}  # how old, only its name tells
        passed = {p: fault for p, fault in faults.items() if p not in older}
        reasons = [*passed.values(), *_wrong_pointer(root, path, passed)]
        if reasons:
            say(f"{'; '.join(reasons)}: the newest intact checkpoint, {path}, is taken")
        return Newest(path, made)
    if not has_any(root):
        return None
    found = "; ".join(faults.values()) or f"{root / LATEST} is there and no checkpoint beside it"
    raise CheckpointError(f"{root} holds no intact checkpoint: {found}; {begin_another(root.parent)}")


def latest(root: Path) -> Path | None:
    """Return the newest checkpoint under ``root`` whose files have the recorded sizes.

    It is None where none was ever finished.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    found = newest(root, check_sizes, lambda text: None)
    return None if found is None else found.path


def last_good(root: Path) -> Path | None:
    """Return the newest checkpoint that no alarm speaks against; None where that is not known."""
    name = pointed(root / LAST_GOOD)
    return root / name if name is not None and (root / name).is_dir() else None


def find(path: Path, which: str | None = "model", say: Say = LOG.warning) -> Path:
    """Return the checkpoint itself, or the newest intact one of a run directory.

    What is read to sample it, the ``which`` weights and the state, is held against its hashes; with None the sizes do.

    Raises:
        CheckpointError: there is none, or none is intact.
    """
    if (path / MANIFEST).is_file():
        return path
    if STEP.fullmatch(path.name) and entries(path.parent):
        raise CheckpointError(f"{fault(path)}; {advice(path)}")
    if path.name == LATEST and path.parent.is_dir() and not (path / "checkpoints").is_dir():
        path = path.parent
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a directory{hint(path)}; give a run directory, a checkpoint or a pipeline directory"
        )
    root = path if has_any(path) else path / "checkpoints"
    names = () if which is None else (f"{which}.safetensors", "state.json")
    found = newest(root, lambda one: verify(one, names), say)
    if found is None:
        raise CheckpointError(
            f"{path} holds no finished checkpoint; give a run directory that has one under checkpoints/, "
            "a checkpoint directory or a pipeline directory"
        )
    return found.path


def load(path: Path) -> Checkpoint:
    """Read a checkpoint after checking every file against its manifest.

    Raises:
        CheckpointError: it is missing, corrupt, truncated or not a checkpoint of flowalign.
    """
    with advised(path):
        return read(path)


def read(path: Path) -> Checkpoint:
    """Load a checkpoint as `load`, with errors that name the fault alone."""
    try:
        manifest = verify(path)
        shards = [name for name in manifest["files"] if name.startswith("optimizer/") and name.endswith(".json")]
        optimizer: dict[int, OptimizerState] = {
            int(name[-10:-5]): (load_file(path / f"{name[:-5]}.safetensors"), json.loads((path / name).read_bytes()))
            for name in sorted(shards)
        }
        return Checkpoint(
            path=path,
            step=manifest["step"],
            model=load_file(path / "model.safetensors"),
            ema=load_file(path / "ema.safetensors") if "ema.safetensors" in manifest["files"] else None,
            optimizer_by_rank=optimizer,
            state=json.loads((path / "state.json").read_bytes()),
            averages={name: load_file(path / f"{name}.safetensors") for name in _averages(manifest)},
            version=manifest["version"],
        )
    except CheckpointError:
        raise
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _averages(manifest: Mapping[str, Any]) -> list[str]:
    return [name.removesuffix(".safetensors") for name in manifest["files"] if name.startswith("ema_")]


def _newest_first(root: Path) -> list[Path]:
    """Sort checkpoints by the manifests' sequence, not by step.

    A run that went back to step 10 writes step 20 again, after step 30.
    """
    known = list(manifests(root))
    return [*reversed([path for path in entries(root) if path not in known]), *reversed(known)]


def newer_than(path: Path) -> list[Path]:
    """Return the checkpoints written after the whole checkpoint ``path``.

    Of damaged ones, whose time is not known, it returns the later steps.

    Raises:
        CheckpointError: ``path`` is not whole.
    """
    own, known = manifest_of(path)["sequence"], manifests(path.parent)
    return [
        other
        for other in entries(path.parent)
        if (known[other]["sequence"] > own if other in known else step_of(other) > step_of(path))
    ]


def pointed(pointer: Path) -> str | None:
    """Return the name in ``latest`` or ``last_good``; None where the file does not hold one."""
    with suppress(OSError, UnicodeDecodeError):
        name = read_regular(pointer).decode("utf-8").strip()
        return name if STEP.fullmatch(name) else None
    return None


def _wrong_pointer(root: Path, taken: Path, passed_over: Collection[Path]) -> list[str]:
    pointer = root / LATEST
    name = pointed(pointer)
    if name is None:
        return [f"{pointer} {'names no checkpoint' if pointer.exists() else 'is missing'}"]
    if name == taken.name or root / name in passed_over:
        return []
    return [f"{pointer} names {name}, which is {'older' if (root / name).exists() else 'not there'}"]
