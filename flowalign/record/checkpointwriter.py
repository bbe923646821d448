"""Writes checkpoints: aside, hashed, renamed; the oldest ones are deleted once a newer one stands."""

from __future__ import annotations

import json
import math
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flowalign.record.checkpoint import HIDDEN, LAST_GOOD, LATEST, SPARE, OptimizerState, pointed
from flowalign.record.destroyed import DestroyedState, fault_of_state
from flowalign.record.disk import BLOCK, draft_of, on_disk, require_room, swept, writing
from flowalign.record.files import save_tensors, sync, tensors_size
from flowalign.record.hashing import sha256
from flowalign.record.manifest import (
    FORMAT,
    MANIFEST,
    VERSION,
    digest_of,
    manifests,
)
from flowalign.record.manifest import steps as steps


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes the checkpoints of one run and deletes those it need not keep.

    ``keep_last`` newest stay, and the ``keep_best`` with the best ``state["metrics"][best_metric]``: the lowest of a
    loss, the highest of anything else. 0 for ``keep_last`` keeps all. What ``latest`` and ``last_good`` name always
    stays. A root has one writer at a time.
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
        final = self.root / f"step_{step:06d}"
        parts = {"model": model, **({} if ema is None else {"ema": ema}), **(averages or {})}
        shards = {f"optimizer/rank_{rank:05d}": shard for rank, shard in (optimizer_by_rank or {}).items()}
        if (found := fault_of_state(parts, [moments for moments, _ in shards.values()])) is not None:
            raise DestroyedState(f"{final} is not written: something has destroyed {found}")
        tensors, texts = _files(parts, shards, state)
        needed = SPARE + on_disk([*map(tensors_size, tensors.values()), *map(len, texts.values())])
        with writing(f"checkpoint {final}", self.root, needed):
            self.root.mkdir(parents=True, exist_ok=True)
            self._sweep()
            require_room(f"checkpoint {final}", self.root, needed)
            with swept(self._hidden()) as hidden:
                _write(hidden, tensors, texts)
                self._seal(hidden, step, state)
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

    def _seal(self, hidden: Path, step: int, state: Mapping[str, Any]) -> None:
        """Force all files to the disk and write their manifest."""
        files = {}
        for path in sorted(hidden.rglob("*.*")):
            sync(path)
            files[path.relative_to(hidden).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        sequence = 1 + max((m["sequence"] for m in manifests(self.root).values()), default=0)
        manifest = {"format": FORMAT, "version": VERSION, "step": step, "sequence": sequence, "files": files}
        metric = state.get("metrics", {}).get(self.best_metric)
        manifest |= {"metrics": {} if metric is None else {self.best_metric: metric}}
        made_of = {key: digest_of(files) for key, files in state.get("made_of", {}).items()}
        manifest |= {"made_of": made_of} if made_of else {}
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
        """Return the checkpoint that each pointer names, for the pointers that name one."""
        named = {pointer: pointed(self.root / pointer) for pointer in (LATEST, LAST_GOOD)}
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
        known_scores = (name for name in scores if not math.isnan(scores[name]))
        best = sorted(known_scores, key=scores.__getitem__, reverse=not is_loss(self.best_metric))
        keep = {path.name for path in list(known)[-self.keep_last :]} | set(best[: self.keep_best])
        keep |= set(self._named().values())
        for path in known:
            if path.name not in keep:
                path.rename(self._hidden())


def is_loss(metric: str) -> bool:
    """Tell whether a key of ``metrics.jsonl`` is a loss, such as ``validation/loss_t0.06``: its lowest is its best."""
    return any(part == "loss" or part.startswith("loss_") for part in metric.split("/"))


def _files(
    parts: Mapping[str, Mapping[str, Tensor]], shards: Mapping[str, OptimizerState], state: Mapping[str, Any]
) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, str]]:
    """Return the tensors and the JSON texts of a checkpoint, by the names of their files."""
    tensors = {**parts, **{name: moments for name, (moments, _) in shards.items()}}
    documents = {"state": state, **{name: facts for name, (_, facts) in shards.items()}}
    return tensors, {name: json.dumps(document, indent=1) for name, document in documents.items()}


def _write(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]) -> None:
    """Write ``name.safetensors`` and ``name.json`` of a checkpoint."""
    (folder / "optimizer").mkdir(parents=True)
    for name, weights in tensors.items():
        save_tensors(weights, folder / f"{name}.safetensors")
    for name, text in texts.items():
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
