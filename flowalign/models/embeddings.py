"""Embeddings of texts on disk by content: a file a text, named by all that decides what it is encoded to.

A negative prompt is a text like any other. Shapes: L tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from flowalign.config.sections import ModelConfig
from flowalign.models.errors import ModelError
from flowalign.models.fingerprint import kept_text_hash
from flowalign.record.checkpoint import content_hash
from flowalign.record.disk import draft_of, folder_for, on_disk
from flowalign.record.files import only_one, save_tensors, tensors_size
from flowalign.record.log import say_once

Encode = Callable[[str, int], Mapping[str, Tensor]]  # a text and its length -> rows (1, ...) by name
Progress = Callable[[int, int], None]  # how many of how many are done
FORMAT = 1
SAID = "embedding"  # in the head of a file, one value: several would be written in any order
HASH, EARLIER_HASH = "content_hash", "sha256"  # in that value, of the rows
READERS = ("diffusers", "transformers")  # whose code holds templates, and which layer a pipeline takes


class NotEmbedded(ModelError):
    """A text has no embedding on disk, and nothing here encodes it."""


class DamagedEmbedding(ModelError):
    """A file of embeddings is not what was written."""


class EmbeddingStore:
    """The embeddings of texts in ``folder``, of one model and for one kind of ``device``.

    The name of a file is the hash of the text, its length, the precision, what encodes (weights, configurations and
    tokenizers with their templates) and what else decides its bits: the kind of device, on a CPU the number of threads
    that torch has. Files are written by rename, so that several may write the same; each holds the hash of its tensors.
    """

    def __init__(self, folder: Path, model: ModelConfig, device: str) -> None:
        self.folder, self._model, self._device = folder, model, device.partition(":")[0]

    @cached_property
    def _encoders(self) -> str:
        return kept_text_hash(self._model, self.folder)

    def key(self, text: str, length: int) -> str:
        """Return the name of the embedding of ``text`` in ``length`` tokens at most. Raise ModelError as the model's
        files do."""
        place = [self._device, torch.get_num_threads()] if self._device == "cpu" else [self._device]
        content = [FORMAT, text, length, self._model.dtype, self._encoders, _readers(), place]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> dict[str, Tensor] | None:
        """Return the rows of a text, (1, ...) by name; None where they are not there.

        Raises:
            DamagedEmbedding: the file was cut short or changed; it is removed, so that the text is encoded anew.
        """
        path = self.path(key)
        if (found := self._open(path)) is None:
            return None
        said, rows = found
        if said.get("key") != key or not _is_as_written(rows, said):
            raise self._damaged(path, "its content has changed")
        return rows

    def _open(self, path: Path, *, rows: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return what a whole file says of itself, and with ``rows`` these; None and errors as `read`."""
        try:
            path.open("rb").close()  # safe_open calls whatever it cannot open missing
            with safe_open(path, "pt") as file:
                said = dict(json.loads(file.metadata()[SAID]))
                # Copies: those of safe_open are the mapped file, and a system allows so many maps of a process.
                own = {name: file.get_tensor(name).clone() for name in file.keys()} if rows else {}
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DamagedEmbedding(f"{path} cannot be read: {error.strerror or error}") from error
        except Exception as error:
            raise self._damaged(path, "it was cut short, or is no file of embeddings") from error
        return said, own

    def _damaged(self, path: Path, why: str) -> DamagedEmbedding:
        with suppress(OSError):
            path.unlink()
        return DamagedEmbedding(f"{path} was damaged and is removed: {why}")

    def write(self, key: str, text: str, rows: Mapping[str, Tensor]) -> None:
        """Keep the rows of a text, (1, ...) by name. Raise DiskError where the disk does not take them."""
        path, own = self.path(key), {name: row.detach().cpu().contiguous() for name, row in rows.items()}
        said = json.dumps({"key": key, "text": text, HASH: content_hash(own)})
        needed = on_disk([tensors_size(own) + len(said)])
        with folder_for(path.parent), draft_of(path, needed=needed, shared=True) as draft:
            save_tensors(own, draft, {SAID: said})

    def lacking(self, texts: Iterable[str], length: int) -> list[str]:
        """Return the ``texts`` without a whole file, each once. A file that was cut short is named and goes."""
        return [text for text in dict.fromkeys(texts) if not self._has(self.key(text, length))]

    def _has(self, key: str) -> bool:
        try:
            return self._open(self.path(key), rows=False) is not None
        except DamagedEmbedding as error:
            say_once(str(error))
            return False

    def fill(self, encode: Encode, texts: Sequence[str], length: int, progress: Progress = lambda *done: None) -> None:
        """Keep what ``encode`` makes of each of the ``texts``; ``progress(done, total)`` is called after each.

        Raises:
            DiskError: the disk does not take them.
        """
        for count, text in enumerate(texts):
            self.write(self.key(text, length), text, encode(text, length))
            progress(count + 1, len(texts))

    def size(self, texts: Iterable[str], length: int) -> int:
        """Return the bytes of the files of ``texts``."""
        paths = {self.path(self.key(text, length)) for text in texts}
        return sum(path.stat().st_size for path in paths if path.is_file())

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Let one process of a machine after the other inside: the second finds what the first has encoded."""
        with folder_for(self.folder), only_one(self.folder / ".filling"):
            yield


@cache
def _readers() -> list[str]:
    return [version(name) for name in READERS]


def _is_as_written(rows: Mapping[str, Tensor], said: Mapping[str, Any]) -> bool:
    """Tell whether ``rows`` have the hash that was written beside them, now or by an earlier version."""
    if HASH in said:
        return said[HASH] == content_hash(rows)
    digest = hashlib.sha256()
    for name, row in sorted(rows.items()):
        digest.update(f"{name} {row.dtype} {tuple(row.shape)} ".encode())
        digest.update(row.view(-1).view(torch.uint8).numpy().data)
    return said.get(EARLIER_HASH) == digest.hexdigest()
