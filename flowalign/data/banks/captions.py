"""Embeddings of a bank's captions on disk, where the bank has none of its own: each table is computed once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from flowalign.config.sections import ModelConfig
from flowalign.models.encoders import Encoders
from flowalign.record.disk import draft_of, on_disk, writing
from flowalign.record.files import save_tensors, tensors_size
from flowalign.types import Condition


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
        table = encoders.encode_prompts(self._prompts, self._length).to("cpu")
        tensors = {
            "tokens": table.tokens_PLD,
            "pooled": table.pooled_PE,
            "null_tokens": table.null_LD.contiguous(),
            "null_pooled": table.null_E.contiguous(),
        }
        needed = on_disk([tensors_size(tensors)])
        with writing(str(self.path), self.path, needed):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with draft_of(self.path, needed=needed, shared=True) as draft:
            save_tensors(tensors, draft)

    def read(self) -> Condition:
        """Return a row a prompt, in the order of the prompts. Raise NotEncoded where the file is not there."""
        if not self.path.is_file():
            raise NotEncoded(f"latents: the captions have not been encoded: {self.path} is missing")
        held = load_file(self.path)
        rows = torch.arange(len(self._prompts))
        return Condition(held["tokens"], held["pooled"], rows, held["null_tokens"], held["null_pooled"])
