"""Checkpoints of a run directory: atomic, hashed, and never half there.

``root`` is ``runs/<name>/checkpoints``. A checkpoint is written into a hidden directory, synced, renamed to
``step_000020``; only then is ``latest``, a text file with that name, replaced by rename. ``last_good``, another such
file, names the newest checkpoint from before an alarm.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flowalign.files import save_tensors

FORMAT = "flowalign-checkpoint"
VERSION = 1
LATEST = "latest"
LAST_GOOD = "last_good"
HIDDEN = ".tmp-"
OptimizerState = tuple[Mapping[str, Tensor], Mapping[str, Any]]


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete, changed or foreign: what, where, what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """What ``load`` read: weights by name, optimizer tensors and facts by rank, the run's own state.

    ``averages`` are those beside ``ema``, by the name of their file.
    """

    path: Path
    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer_by_rank: dict[int, OptimizerState]
    state: dict[str, Any]
    averages: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def optimizer_of(self, rank: int) -> OptimizerState:
        """The optimizer state for ``rank``; without ZeRO all ranks hold the same, so a new rank gets rank 0's."""
        return self.optimizer_by_rank[rank if rank in self.optimizer_by_rank else 0]


def content_hash(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def latest(root: Path) -> Path | None:
    """The newest checkpoint under ``root``; None where none was ever finished.

    Raises:
        CheckpointError: ``latest`` names a directory that is not there.
    """
    return _pointed(root, LATEST)


def last_good(root: Path) -> Path | None:
    """The newest checkpoint that no alarm speaks against; None where there is none. Raises as ``latest`` does."""
    return _pointed(root, LAST_GOOD)


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(path.name.removeprefix("step_"))


def steps(root: Path) -> list[int]:
    """The steps of the checkpoints under ``root``, ascending."""
    return sorted(step_of(path) for path in _manifests(root))


def has_any(root: Path) -> bool:
    """Whether checkpoints were written under ``root``, be they whole or not."""
    return (root / LATEST).exists() or any(root.glob("step_*"))


def _pointed(root: Path, pointer: str) -> Path | None:
    try:
        name = (root / pointer).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    if not re.fullmatch(r"step_\d+", name) or not (root / name).is_dir():
        raise CheckpointError(f"{root / pointer} names {name!r}, which is no checkpoint there; {_advice(root / name)}")
    return root / name


def load(path: Path) -> Checkpoint:
    """Read a checkpoint after checking every file against its manifest.

    Raises:
        CheckpointError: it is missing, corrupt, truncated or not a checkpoint of flowalign.
    """
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
        )
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{error}; {_advice(path)}") from error


def _averages(manifest: Mapping[str, Any]) -> list[str]:
    return [name.removesuffix(".safetensors") for name in manifest["files"] if name.startswith("ema_")]


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files all have the recorded sha256; raises CheckpointError."""
    manifest = _manifest(path)
    for name, recorded in manifest["files"].items():
        try:
            if (path / name).stat().st_size != recorded["bytes"]:
                raise CheckpointError(f"{path / name} is truncated or has grown")
            if _sha256(path / name) != recorded["sha256"]:
                raise CheckpointError(f"{path / name} is corrupt (its sha256 is not the recorded one)")
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read ({error.strerror})") from error
    return manifest


def _manifest(path: Path) -> dict[str, Any]:
    """MANIFEST.json of a checkpoint, whole; the files it names are not looked at."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory")
    try:
        manifest = json.loads((path / "MANIFEST.json").read_bytes())
        claimed = manifest.pop("digest")
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path} has no readable MANIFEST.json, so it is no checkpoint") from error
    if claimed != _digest(manifest):
        raise CheckpointError(f"{path / 'MANIFEST.json'} is corrupt")
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(f"{path} is not a {FORMAT} of version {VERSION}")
    return manifest


def _manifests(root: Path) -> dict[Path, dict[str, Any]]:
    """Whole manifests under ``root``, in the order they were written."""
    found = {}
    for path in root.glob("step_*"):
        with suppress(CheckpointError):
            found[path] = _manifest(path)
    return dict(sorted(found.items(), key=lambda item: item[1]["sequence"]))


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes the checkpoints of one run and deletes those it need not keep.

    ``keep_last`` newest stay, and the ``keep_best`` with the highest ``state["metrics"][best_metric]``; 0 for
    ``keep_last`` keeps all. What ``latest`` and ``last_good`` name always stays. A root has one writer at a time.
    """

    root: Path
    keep_last: int = 3
    keep_best: int = 0
    best_metric: str = "eval/geneval/overall"

    def save(
        self,
        step: int,
        *,
        model: Mapping[str, Tensor],
        state: Mapping[str, Any],
        ema: Mapping[str, Tensor] | None = None,
        averages: Mapping[str, Mapping[str, Tensor]] | None = None,
        optimizer_by_rank: Mapping[int, OptimizerState] | None = None,
    ) -> Path:
        """Write ``step_<step>`` and point ``latest`` at it; an older checkpoint of this step is replaced.

        ``averages`` are those beside ``ema``, by names that begin with ``ema_``.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        self._sweep()
        hidden = self._hidden()
        (hidden / "optimizer").mkdir(parents=True)
        shards = {f"optimizer/rank_{rank:05d}": shard for rank, shard in (optimizer_by_rank or {}).items()}
        tensors = {"model": model, **({} if ema is None else {"ema": ema}), **(averages or {})}
        tensors |= {name: moments for name, (moments, _) in shards.items()}
        for name, weights in tensors.items():
            save_tensors(weights, hidden / f"{name}.safetensors")
        for name, document in {"state": state, **{n: facts for n, (_, facts) in shards.items()}}.items():
            (hidden / f"{name}.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
        self._seal(hidden, step, state.get("metrics", {}).get(self.best_metric))
        final = self.root / f"step_{step:06d}"
        if final.exists():
            self._make_room(final)
        hidden.rename(final)
        _sync(self.root)
        self._point(LATEST, final.name)
        self._prune()
        self._sweep()
        return final

    def mark_good(self, step: int | None) -> None:
        """Point ``last_good`` at the checkpoint of a step, or at none; the one it named before may then be deleted."""
        name = None if step is None else f"step_{step:06d}"
        if name == self._named().get(LAST_GOOD):
            return
        if name is None:
            (self.root / LAST_GOOD).unlink()
        else:
            self._point(LAST_GOOD, name)
        self._prune()
        self._sweep()

    def _hidden(self) -> Path:
        return self.root / f"{HIDDEN}{uuid.uuid4().hex}"

    def _sweep(self) -> None:
        """Delete what killed writers, and this one, left hidden."""
        for leftover in self.root.glob(f"{HIDDEN}*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def _seal(self, hidden: Path, step: int, metric: float | None) -> None:
        """Force all files to the disk and write their manifest."""
        files = {}
        for path in sorted(hidden.rglob("*.*")):
            _sync(path)
            files[path.relative_to(hidden).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        sequence = 1 + max((m["sequence"] for m in _manifests(self.root).values()), default=0)
        manifest = {"format": FORMAT, "version": VERSION, "step": step, "sequence": sequence, "files": files}
        manifest |= {"metrics": {} if metric is None else {self.best_metric: metric}}
        sealed = json.dumps({**manifest, "digest": _digest(manifest)}, indent=1)
        (hidden / "MANIFEST.json").write_text(sealed, encoding="utf-8")
        for written in (hidden / "MANIFEST.json", hidden / "optimizer", hidden):
            _sync(written)

    def _make_room(self, final: Path) -> None:
        """Move an older ``final`` out of the way; ``latest`` first falls back to the newest other one."""
        named = self._named()
        if named.get(LATEST) == final.name:
            others = [path.name for path in _manifests(self.root) if path != final]
            self._point(LATEST, others[-1]) if others else (self.root / LATEST).unlink()
        if named.get(LAST_GOOD) == final.name:
            (self.root / LAST_GOOD).unlink()
        final.rename(self._hidden())

    def _named(self) -> dict[str, str]:
        """What each pointer that is there names."""
        there = [pointer for pointer in (LATEST, LAST_GOOD) if (self.root / pointer).exists()]
        return {pointer: (self.root / pointer).read_text(encoding="utf-8").strip() for pointer in there}

    def _point(self, pointer: str, name: str) -> None:
        hidden = self._hidden()
        hidden.write_text(f"{name}\n", encoding="utf-8")
        _sync(hidden)
        hidden.rename(self.root / pointer)
        _sync(self.root)

    def _prune(self) -> None:
        manifests = _manifests(self.root)
        scores = {path.name: m["metrics"].get(self.best_metric, math.nan) for path, m in manifests.items()}
        best = sorted((name for name in scores if not math.isnan(scores[name])), key=scores.__getitem__, reverse=True)
        keep = {path.name for path in list(manifests)[-self.keep_last :]} | set(best[: self.keep_best])
        keep |= set(self._named().values())
        for path in manifests:
            if path.name not in keep:
                path.rename(self._hidden())


def _advice(path: Path) -> str:
    """What to do instead: the newest intact checkpoint beside ``path``."""
    for sibling in reversed(_manifests(path.parent)):
        with suppress(CheckpointError):
            if sibling != path and verify(sibling):
                return f"the newest intact checkpoint beside it is {sibling}: resume from that"
    return "no other intact checkpoint is beside it: start the run anew, or name another directory"


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
