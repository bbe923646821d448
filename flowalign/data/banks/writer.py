"""Writes a bank shard by shard: an interrupted run goes on after its last finished shard, to the same bytes.

Until the manifest is written, the hidden folder ``.precompute`` holds what a continuation needs: the options, and for
each finished shard its rows of the source, its new prompts and what was skipped before it was full.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.data.banks.bank import LatentsError, Shard
from flowalign.data.banks.files import write_json
from flowalign.data.banks.latents import MANIFEST, shard_name, write_manifest, write_shard
from flowalign.data.images import Skipped
from flowalign.record.disk import FULL, DiskError, missing, remove_empty, size_text, writing
from flowalign.record.textfiles import TextError, read_object

WORK, SKIPPED, FROM = ".precompute", "skipped.json", "made_from"


class BankWriter:
    """A bank under way. ``position`` rows of the source are behind it; of these ``settled`` are done with.

    ``source_digest`` is what the caller said of the rows before ``position``. ``identity`` is all that decides the
    bank's content; ``made_from`` has digests of what some of its keys name, and where they are known they decide.

    Raises:
        LatentsError: the directory holds something else, or was begun with another identity.
    """

    def __init__(
        self, directory: Path, identity: Mapping[str, Any], made_from: Mapping[str, str] | None = None
    ) -> None:
        self.directory, self.work, self.identity = directory, directory / WORK, dict(identity)
        self.made_from = dict(made_from or {})
        self.entries: list[dict[str, Any]] = []
        self.prompts: dict[str, int] = {}
        self.skipped: list[Skipped] = []
        self.settled: set[int] = set()
        self.position, self.source_digest, self.has_noise = 0, "", False
        self._recorded = 0  # of the skipped
        self._made = missing(directory)
        if self._begun():
            self._restore()

    @property
    def count(self) -> int:
        return sum(entry["count"] for entry in self.entries)

    def skip(self, row: Skipped) -> None:
        self.skipped.append(row)
        self.settled.add(row.number)

    def write(
        self,
        latents: Tensor,
        numbers: Sequence[int],
        captions: Sequence[Mapping[str, str]],
        position: int,
        digest: str,
        noise: Tensor | None = None,
    ) -> None:
        """Write one shard: latents (n, C, h, w) of the rows ``numbers`` with their captions, and their noise where they
        have one; all shards have noise or none. Raise DiskError where the disk refuses."""
        known = len(self.prompts)
        rows = {
            name: torch.tensor([self.prompts.setdefault(own[name], len(self.prompts)) for own in captions])
            for name in captions[0]
        }
        number = len(self.entries)
        entry = write_shard(self.directory, number, Shard(latents, rows, noise))
        record = {
            "entry": entry,
            "rows": list(numbers),
            "prompts": list(self.prompts)[known:],
            "skipped": [vars(row) for row in self.skipped[self._recorded :]],
            "position": position,
            "source_digest": digest,
            "noise": noise is not None,
        }
        write_json(self._record(number), record)
        self.has_noise = noise is not None
        self._recorded, self.position, self.source_digest = len(self.skipped), position, digest
        self.entries.append(entry)
        self.settled.update(numbers)

    def finish(
        self, captions: Sequence[str], encoder: str, embeddings: Mapping[str, Any] | None, more: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write the list of what was skipped and the manifest, and forget how it came about."""
        ordered = sorted(self.skipped, key=lambda row: row.number)
        listed = write_json(self.directory / SKIPPED, [vars(row) for row in ordered])
        kinds = [row.kind for row in ordered]
        counts = {kind: kinds.count(kind) for kind in ("image", "caption", "duplicate")}
        more = {FROM: self.made_from, **more, "skipped": {**listed, **counts}, "made": self.identity}
        manifest = write_manifest(
            self.directory,
            self.entries,
            list(self.prompts),
            captions=captions,
            noise=self.has_noise,
            encoder=encoder,
            embeddings=embeddings,
            more=more,
        )
        shutil.rmtree(self.work)
        return manifest

    @contextmanager
    def on_full_disk(self, total: int | None) -> Iterator[None]:
        """Tell with what the disk refuses what was finished and what to do; ``total`` are the source's rows.

        Raises:
            DiskError: that.
        """
        try:
            with writing(str(self.directory), self.directory, only=FULL):  # what is read is another matter
                yield
        except DiskError as error:
            self._say_full(error, total)

    def _say_full(self, error: DiskError, total: int | None) -> None:
        rest, rows_left = "", 0 if total is None else total - self.position
        if self.entries and rows_left > 0:
            each = sum(entry["bytes"] for entry in self.entries) / self.count
            rest = f"; about {size_text(int(each * rows_left))} are needed for all that is left"
        kept = "no shard was finished: the same command begins anew"
        if self.entries:
            kept = f"{len(self.entries)} finished shards with {self.count} images are kept: the same command goes on "
            kept += "from there"
        said = DiskError(f"{error}{rest}; {kept}")
        said.begun = self.work.is_dir()
        if not self.entries:
            (self.directory / shard_name(0)).unlink(missing_ok=True)  # whose record was refused
            shutil.rmtree(self.work, ignore_errors=True)
            remove_empty(self._made)
        raise said from error

    def _record(self, number: int) -> Path:
        return self.work / f"{Path(shard_name(number)).stem}.json"

    def _begun(self) -> bool:
        """Tell whether there is something to continue; otherwise make the directory ready."""
        options = self.work / "options.json"
        if (self.directory / MANIFEST).exists() or (self.directory / "latents.safetensors").exists():
            raise LatentsError(
                f"--to: {self.directory} holds a finished bank of another source, of one that has changed since, or "
                "of other options; name another directory"
            )
        if not options.is_file():
            if self.directory.exists() and any(path != self.work for path in self.directory.iterdir()):
                raise LatentsError(f"--to: {self.directory} holds other files; name a new or empty directory")
            with self.on_full_disk(None):
                self.work.mkdir(parents=True, exist_ok=True)
                write_json(options, {**self.identity, FROM: self.made_from})
            return False
        before = _own(options)
        if changed := _changed(before, self.identity, self.made_from):
            key = changed[0]
            if before.get(key) == self.identity[key]:
                raise LatentsError(
                    f"--to: {self.directory} was begun when {self.identity[key]} held something else ({key}); "
                    "give what it was then to continue, or name another directory"
                )
            raise LatentsError(
                f"--to: {self.directory} was begun with {key} {before.get(key)!r}, now it is {self.identity[key]!r}; "
                "give the same options to continue, or name another directory"
            )
        return True

    def _restore(self) -> None:
        number = 0
        while (path := self._record(number)).is_file():
            record = _own(path)
            shard = self.directory / record["entry"]["file"]
            if not shard.is_file() or shard.stat().st_size != record["entry"]["bytes"]:
                break
            self.entries.append(record["entry"])
            for prompt in record["prompts"]:
                self.prompts[prompt] = len(self.prompts)
            for row in record["skipped"]:
                self.skip(Skipped(**row))
            self.settled.update(record["rows"])
            self.position, self.source_digest = record["position"], record["source_digest"]
            self.has_noise = record["noise"]
            number += 1
        self._recorded = len(self.skipped)
        while (path := self._record(number)).is_file():
            path.unlink()
            number += 1


def finished(
    directory: Path, identity: Mapping[str, Any], made_from: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """Return the manifest of a bank that was made with this very identity and of the same content.

    It is None where there is none.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return None
    manifest = _own(path)
    made = manifest.get("made")
    if not isinstance(made, dict) or made.keys() != identity.keys():
        return None
    return None if _changed({**made, FROM: manifest.get(FROM)}, identity, made_from or {}) else manifest


def _changed(before: Mapping[str, Any], identity: Mapping[str, Any], made_from: Mapping[str, str]) -> list[str]:
    """Return the keys that are not what they were; where a digest of something is known, its name does not matter."""
    held = before.get(FROM) or {}
    return [
        key
        for key in identity
        if (held[key] != made_from[key] if key in held and key in made_from else before.get(key) != identity[key])
    ]


def _own(path: Path) -> dict[str, Any]:
    """Read a file of the bank that this module has written."""
    try:
        return read_object(path)
    except TextError as error:
        raise LatentsError(f"--to: {error}; it is damaged, so make the bank in another directory") from error
