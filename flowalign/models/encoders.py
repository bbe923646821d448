"""The half of a model that does not learn: text encoders and autoencoder.

Shapes: N samples, C h w latents, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from flowalign.conditions import cat_rows
from flowalign.models.embeddings import DamagedEmbedding, EmbeddingStore, NotEmbedded
from flowalign.models.errors import ModelError
from flowalign.models.family import ModelFamily
from flowalign.record.disk import DiskError
from flowalign.record.log import say_once
from flowalign.types import Condition

CACHED_PROMPTS = 512


def text_rows(family: ModelFamily, rows: Sequence[Mapping[str, Tensor]], longest: int = 0) -> dict[str, Tensor]:
    """Return the rows of single prompts, (1, ...), as one table.

    Texts of their own length are padded to the family's multiple of the longest, or of ``longest`` where that is more.
    """
    if multiple := family.padding:
        longest = max(longest, *(row["tokens"].shape[1] for row in rows))
        rows = [padded(row, math.ceil(longest / multiple) * multiple) for row in rows]
    return cat_rows(rows)


def padded(row: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Return the row of a text with zeros behind its tokens (1, L, D), up to ``length``, and a mask (1, length)."""
    tokens = row["tokens"]
    missing = length - tokens.shape[1]
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return {**row, "tokens": pad(tokens, (0, 0, 0, missing)), "mask": pad(row.get("mask", mask), (0, missing))}


class Encoders:
    """Between people and latents: texts and pictures in, pictures out.

    ``pipeline`` is one of the family's whose network has no weights; all else is frozen and in eval mode. Texts that
    lie in ``embeddings`` are read from there, so that without text encoders these alone can be had; others go there.
    """

    def __init__(self, family: ModelFamily, pipeline: Any) -> None:
        self.family, self.pipeline = family, pipeline
        self.embeddings: EmbeddingStore | None = None
        self.vae = pipeline.vae
        if all(weight.ndim <= 4 for weight in self.vae.parameters()):
            self.vae.to(memory_format=torch.channels_last)  # faster convolutions on a CPU
        for part in self.modules:
            part.requires_grad_(False).eval()
        self._encode = lru_cache(maxsize=CACHED_PROMPTS)(self._encode_one)

    @property
    def text_encoders(self) -> list[torch.nn.Module]:
        """Those that were loaded."""
        parts = (getattr(self.pipeline, name, None) for name in self.family.text)
        return [part for part in parts if isinstance(part, torch.nn.Module)]

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Autoencoder and text encoders."""
        return [self.vae, *self.text_encoders]

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def to(self, device: str | torch.device) -> Encoders:
        """Move all parts, in place."""
        for part in self.modules:
            part.to(device)
        self._encode.cache_clear()
        return self

    @torch.no_grad()
    def encode_prompts(
        self, prompts: Sequence[str], length: int, *, negatives: Sequence[str] | None = None, full: bool = False
    ) -> Condition:
        """Encode each distinct prompt as one row, mapped back to all prompts, and likewise the negative ones.

        Each is encoded once and alone, so that its embedding never depends on its batch. ``length`` is that of the part
        of the text which a configuration chooses (``model.max_sequence_length``), or the most tokens of it. All texts
        of one call are padded to the length of the longest, or with ``full`` to ``length``; `text_lengths` tells which
        have one length. ``negatives`` are a prompt for each of the prompts; by default the family's own.

        Raises:
            ModelError: as `encode_text` does.
        """
        text, index = self._rows(prompts, length, full)
        null, null_index = self._rows(negatives or [self.family.negative or ""] * len(prompts), length, full)
        return Condition(text, null, index, null_index)

    def _rows(self, prompts: Sequence[str], length: int, full: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Return a row for each distinct prompt, and which of them each prompt has."""
        places = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        rows = [self.encode_text(prompt, length) for prompt in places]
        table = text_rows(self.family, rows, length if full else 0)
        return table, torch.tensor([places[prompt] for prompt in prompts], device=self.device)

    @torch.no_grad()
    def encode_text(self, text: str, length: int) -> dict[str, Tensor]:
        """Encode one text, by itself, to rows (1, ...) by name, without padding where texts are of their own length.

        Raises:
            NotEmbedded: the text encoders were not loaded, and ``embeddings`` do not have it.
            DamagedEmbedding: likewise, since its file was damaged.
        """
        return self._encode(text, length)

    def _encode_one(self, text: str, length: int) -> dict[str, Tensor]:
        kept = self.embeddings
        if kept is None:
            if not self.text_encoders:
                raise ModelError("the text encoders of this model were not loaded")
            return self.family.encode(self.pipeline, text, length)
        key = kept.key(text, length)
        if (found := self._read(kept, key, text)) is not None:
            return {name: row.to(self.device) for name, row in found.items()}
        if not self.text_encoders:
            raise NotEmbedded(f"{kept.folder} has no embedding of {text!r}, and the text encoders were not loaded")
        rows = self.family.encode(self.pipeline, text, length)
        try:
            kept.write(key, text, rows)
        except DiskError as error:  # what is encoded serves without it
            self.embeddings = None
            say_once(f"{error}; from here on no embeddings are kept")
        return rows

    def _read(self, kept: EmbeddingStore, key: str, text: str) -> dict[str, Tensor] | None:
        try:
            return kept.read(key)
        except DamagedEmbedding as error:
            if not self.text_encoders:
                raise DamagedEmbedding(f"{error}; the same command encodes {text!r} anew") from error
            say_once(f"{error}; {text!r} is encoded anew")
            return None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (N, C, h, w) to images, uint8 (N, H, W, 3)."""
        pixels = self.decode_pixels(latents)
        return pixels.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Decode latents (N, C, h, w) to pixels (N, 3, H, W) about [0, 1], float32; differentiable."""
        return self.family.decode(self.vae, latents) / 2 + 0.5

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images, uint8 (N, H, W, 3), to latents (N, C, h, w): the posterior's mean."""
        pixels = images.permute(0, 3, 1, 2).to(self.vae.dtype).div(127.5).sub(1)
        return self.family.encode_pictures(self.vae, pixels)
