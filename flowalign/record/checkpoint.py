"""Checkpoints of a run directory: atomic, hashed, and never half there.

``root`` is ``runs/<name>/checkpoints``. A checkpoint is written into a hidden directory, synced, renamed to
``step_000020``; only then is ``latest``, a text file with that name, replaced by rename. It is a hint for people: the
newest checkpoint is the whole one with the highest ``sequence`` in its manifest. ``last_good``, another such file,
names the newest checkpoint from before an alarm.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flowalign.record.destroyed import DestroyedState, fault_of_state
from flowalign.record.disk import BLOCK, draft_of, on_disk, require_room, swept, writing
from flowalign.record.files import save_tensors, sha256, sync, tensors_size
from flowalign.record.kinds import read_regular
from flowalign.record.manifest import (
    FORMAT,
    MANIFEST,
    STEP,
    VERSION,
    CheckpointError,
    advice,
    advised,
    begin_another,
    check_sizes,
    digest_of,
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
LOG = logging.getLogger("flowalign")
T = TypeVar("T")
Say = Callable[[str], object]
OptimizerState = tuple[Mapping[str, Tensor], Mapping[str, Any]]


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
        """The optimizer state for ``rank``; without ZeRO all ranks hold the same, so a new rank gets rank 0's.

        Raises:
            CheckpointError: none was saved.
        """
        if not self.optimizer_by_rank:
            raise CheckpointError(f"{self.path} holds no optimizer state, which training on needs")
        return self.optimizer_by_rank[rank if rank in self.optimizer_by_rank else 0]


def content_hash(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def has_any(root: Path) -> bool:
    """Whether checkpoints were written under ``root``, be they whole or not."""
    return (root / LATEST).exists() or bool(entries(root))


@dataclass(frozen=True)
class Newest(Generic[T]):
    """The newest intact checkpoint, what was made of it, and the newer ones that were passed over."""

    path: Path
    made: T
    passed_over: tuple[Path, ...]


def newest(root: Path, check: Callable[[Path], T], say: Say = LOG.warning) -> Newest[T] | None:
    """The checkpoint that was written last of those in which ``check`` finds no fault; None where there is none at all.

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
        return Newest(path, made, tuple(passed))
    if not has_any(root):
        return None
    found = "; ".join(faults.values()) or f"{root / LATEST} is there and no checkpoint beside it"
    raise CheckpointError(f"{root} holds no intact checkpoint: {found}; {begin_another(root.parent)}")


def latest(root: Path) -> Path | None:
    """The newest checkpoint under ``root`` whose files have the recorded sizes; None where none was ever finished.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.
    """
    found = newest(root, check_sizes, lambda text: None)
    return None if found is None else found.path


def last_good(root: Path) -> Path | None:
    """The newest checkpoint that no alarm speaks against; None where that is not known."""
    name = _pointed(root / LAST_GOOD)
    return root / name if name is not None and (root / name).is_dir() else None


def find(path: Path, which: str | None = "model", say: Say = LOG.warning) -> Path:
    """The checkpoint itself, or the newest intact one of a run directory.

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
    """``load``, whose errors name the fault alone."""
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
    except CheckpointError:
        raise
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _averages(manifest: Mapping[str, Any]) -> list[str]:
    return [name.removesuffix(".safetensors") for name in manifest["files"] if name.startswith("ema_")]


def _newest_first(root: Path) -> list[Path]:
    """By the manifests' sequence, not by step: a run that went back to step 10 writes step 20 again, after step 30."""
    known = list(manifests(root))
    return [*reversed([path for path in entries(root) if path not in known]), *reversed(known)]


def newer_than(path: Path) -> list[Path]:
    """What was written after the whole checkpoint ``path``; of damaged ones, whose time is not known, the later steps.

    Raises:
        CheckpointError: ``path`` is not whole.
    """
    own, known = manifest_of(path)["sequence"], manifests(path.parent)
    return [
        other
        for other in entries(path.parent)
        if (known[other]["sequence"] > own if other in known else step_of(other) > step_of(path))
    ]


def _pointed(pointer: Path) -> str | None:
    """The name in ``latest`` or ``last_good``; None where the file does not hold one."""
    with suppress(OSError, UnicodeDecodeError):
        name = read_regular(pointer).decode("utf-8").strip()
        return name if STEP.fullmatch(name) else None
    return None


def _wrong_pointer(root: Path, taken: Path, passed_over: Collection[Path]) -> list[str]:
    pointer = root / LATEST
    name = _pointed(pointer)
    if name is None:
        return [f"{pointer} {'names no checkpoint' if pointer.exists() else 'is missing'}"]
    if name == taken.name or root / name in passed_over:
        return []
    return [f"{pointer} names {name}, which is {'older' if (root / name).exists() else 'not there'}"]


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

        Raises:
            DestroyedState: nothing was written, nothing older deleted.
            DiskError: the disk does not take it; what was there before is untouched, and nothing half-written is left.
        """
        parts = {"model": model, **({} if ema is None else {"ema": ema}), **(averages or {})}
        found = fault_of_state(parts, [moments for moments, _ in (optimizer_by_rank or {}).values()])
        if found is not None:
            raise DestroyedState(f"{self.root / f'step_{step:06d}'} is not written: something has destroyed {found}")
        shards = {f"optimizer/rank_{rank:05d}": shard for rank, shard in (optimizer_by_rank or {}).items()}
        tensors = parts | {name: moments for name, (moments, _) in shards.items()}
        made_of = {key: digest_of(files) for key, files in state.get("made_of", {}).items()}
        documents = {"state": state, **{name: facts for name, (_, facts) in shards.items()}}
        texts = {name: json.dumps(document, indent=1) for name, document in documents.items()}
        final = self.root / f"step_{step:06d}"
        needed = SPARE + on_disk([*map(tensors_size, tensors.values()), *map(len, texts.values())])
        with writing(f"checkpoint {final}", self.root, needed):
            self.root.mkdir(parents=True, exist_ok=True)
            self._sweep()
            require_room(f"checkpoint {final}", self.root, needed)
            with swept(self._hidden()) as hidden:
                (hidden / "optimizer").mkdir(parents=True)
                for name, weights in tensors.items():
                    save_tensors(weights, hidden / f"{name}.safetensors")
                for name, text in texts.items():
                    (hidden / f"{name}.json").write_text(text, encoding="utf-8")
                self._seal(hidden, step, state.get("metrics", {}).get(self.best_metric), made_of)
                if final.exists():
                    self._make_room(final)
                hidden.rename(final)
            sync(self.root)
            self.point(LATEST, final.name)
            self._prune()
            self._sweep()
        return final

    def mark_good(self, step: int | None) -> None:
        """Point ``last_good`` at the checkpoint of a step, or at none; the one it named before may then be deleted."""
        name = None if step is None else f"step_{step:06d}"
        if name == self._named().get(LAST_GOOD):
            return
        with writing(str(self.root / LAST_GOOD), self.root, BLOCK):
            if name is None:
                (self.root / LAST_GOOD).unlink()
            else:
                self.point(LAST_GOOD, name)
            self._prune()
            self._sweep()

    def _hidden(self) -> Path:
        return self.root / f"{HIDDEN}{uuid.uuid4().hex}"

    def _sweep(self) -> None:
        """Delete what killed writers, and this one, left hidden."""
        for leftover in self.root.glob(f"{HIDDEN}*"):
            shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()

    def _seal(self, hidden: Path, step: int, metric: float | None, made_of: Mapping[str, str]) -> None:
        """Force all files to the disk and write their manifest."""
        files = {}
        for path in sorted(hidden.rglob("*.*")):
            sync(path)
            files[path.relative_to(hidden).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        sequence = 1 + max((m["sequence"] for m in manifests(self.root).values()), default=0)
        manifest = {"format": FORMAT, "version": VERSION, "step": step, "sequence": sequence, "files": files}
        manifest |= {"metrics": {} if metric is None else {self.best_metric: metric}}
        manifest |= {"made_of": dict(made_of)} if made_of else {}
        sealed = json.dumps({**manifest, "digest": digest_of(manifest)}, indent=1)
        (hidden / MANIFEST).write_text(sealed, encoding="utf-8")
        for written in (hidden / MANIFEST, hidden / "optimizer", hidden):
            sync(written)

    def _make_room(self, final: Path) -> None:
        """Move an older ``final`` out of the way; ``latest`` first falls back to the newest other one."""
        named = self._named()
        if named.get(LATEST) == final.name:
            others = [path.name for path in manifests(self.root) if path != final]
            self.point(LATEST, others[-1]) if others else (self.root / LATEST).unlink()
        if named.get(LAST_GOOD) == final.name:
            (self.root / LAST_GOOD).unlink()
        final.rename(self._hidden())

    def _named(self) -> dict[str, str]:
        """What each pointer names that names something."""
        named = {pointer: _pointed(self.root / pointer) for pointer in (LATEST, LAST_GOOD)}
        return {pointer: name for pointer, name in named.items() if name is not None}

    def point(self, pointer: str, name: str) -> None:
        """Write ``latest`` or ``last_good`` anew, by rename; raises DiskError."""
        final = self.root / pointer
        with draft_of(final, needed=BLOCK) as hidden:
            hidden.write_text(f"{name}\n", encoding="utf-8")
            sync(hidden)
            if final.is_dir() and not final.is_symlink():  # somebody's copy of a checkpoint: a file cannot replace it
                final.rename(self.root / f"{pointer}-{uuid.uuid4().hex[:8]}")
        sync(self.root)

    def _prune(self) -> None:
        known = manifests(self.root)
        scores = {path.name: m["metrics"].get(self.best_metric, math.nan) for path, m in known.items()}
        best = sorted((name for name in scores if not math.isnan(scores[name])), key=scores.__getitem__, reverse=True)
        keep = {path.name for path in list(known)[-self.keep_last :]} | set(best[: self.keep_best])
        keep |= set(self._named().values())
        for path in known:
            if path.name not in keep:
                path.rename(self._hidden())
