"""Embeddings of a bank's captions on disk, where the bank has none of its own: each table is computed once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from flowalign.conditions import count_rows
from flowalign.config.sections import ModelConfig
from flowalign.models.encoders import Encoders
from flowalign.record.disk import draft_of, on_disk, writing
from flowalign.record.files import save_tensors, tensors_size
from flowalign.types import Condition

NULL = "null_"


def stored(table: Condition) -> dict[str, Tensor]:
    """Return the tensors of a table with one negative prompt as its file has them: the prompts' rows, (P, ...) by name,
    and under ``null_<name>`` the negative one's, without the dimension of the row."""
    return {**table.text, **{f"{NULL}{name}": rows[0].contiguous() for name, rows in table.null.items()}}


def table_of(tensors: Mapping[str, Tensor]) -> Condition:
    """Return what a file of embeddings holds: one row a prompt, in the order of the prompts."""
    null = {name.removeprefix(NULL): row[None] for name, row in tensors.items() if name.startswith(NULL)}
    text = {name: tensors[name] for name in null}
    count = count_rows(text)
    return Condition(text, null, torch.arange(count), torch.zeros(count, dtype=torch.long))


class NotEncoded(RuntimeError):
    """Data to learn from has not been encoded yet, and there are no encoders here."""


class CaptionTable:
    """A file of the embeddings of ``prompts``, named by them, by ``encoder``, the hash of what encodes, and by length.

    It lies in ``<bank>.cache``, or in ``spare`` where the bank's folder cannot be written to.
    """

    def __init__(
        self, bank: Path, prompts: Sequence[str], model: ModelConfig, length: int, encoder: str, spare: Path
    ) -> None:
        self._prompts, self._length = list(prompts), length
        content = json.dumps([encoder, model.dtype, length, self._prompts])
        name = f"{hashlib.sha256(content.encode()).hexdigest()}.safetensors"
        beside = Path(f"{bank}.cache")
        self.path = (beside if os.access(beside if beside.exists() else bank.parent, os.W_OK) else spare) / name

    def write(self, encoders: Encoders) -> None:
        """Encode the prompts, unless the file is there; written by rename. Raises DiskError."""
        if self.path.is_file():
            return
        table = encoders.encode_prompts(self._prompts, self._length, full=True).to("cpu")
        tensors = stored(table)
        needed = on_disk([tensors_size(tensors)])
        with writing(str(self.path), self.path, needed):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with draft_of(self.path, needed=needed, shared=True) as draft:
            save_tensors(tensors, draft)

    def read(self) -> Condition:
        """Return a row a prompt, in the order of the prompts. Raise NotEncoded where the file is not there."""
        if not self.path.is_file():
            raise NotEncoded(f"latents: the captions have not been encoded: {self.path} is missing")
        return table_of(load_file(self.path))
