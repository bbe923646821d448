"""Preference pairs from disk: every image and caption is encoded once, pairs are drawn by (seed, iteration).

Shapes: N pairs of an iteration, P distinct captions, C H W latents, L tokens, D and E widths.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from flowalign.algorithm import seeded
from flowalign.config import AlignConfig, ModelConfig
from flowalign.data.encoderhash import encoder_hash
from flowalign.files import save_tensors
from flowalign.models.base import Policy
from flowalign.types import Condition, PreferencePairs

COLUMNS = ("jpg_0", "jpg_1", "label_0", "label_1", "caption")


class PreferencesError(ValueError):
    """A preference set that is missing, malformed, or without a single preference."""


@dataclass(frozen=True)
class Row:
    """One labelled pair; ``winner`` 0 or 1 is the preferred image, None a tie."""

    where: str
    images: tuple[bytes, bytes]
    caption: str
    winner: int | None


def check_source(source: Path) -> None:
    """Raise PreferencesError, without reading a pair, unless ``source`` is a set with all columns."""
    _open(source)


def read_rows(source: Path) -> Iterator[Row]:
    """The pairs of a parquet file or a folder, in order, images as their files' bytes.

    The columns are Pick-a-Pic v2's; a label is 1 for the preferred image, 0 for the other, and equal ones are a tie.
    A folder holds parquet files, or images and a metadata.jsonl with ``jpg_0_file_name`` and ``jpg_1_file_name``.

    Raises:
        PreferencesError: with the row.
    """
    from datasets.exceptions import DatasetsError

    dataset = _open(source)
    try:
        for number, row in enumerate(dataset):
            yield _row(row, f"{source}, row {number}")
    except PreferencesError:
        raise
    except (DatasetsError, OSError, ValueError) as error:
        raise PreferencesError(f"data.preferences: {source} cannot be read: {error}") from error


def _open(source: Path) -> Any:
    """The set as a stream, so that no second copy of it is written."""
    from datasets import Image, load_dataset
    from datasets.exceptions import DatasetsError

    if not source.exists():
        raise PreferencesError(f"data.preferences: {source} does not exist; give a parquet file or a folder of pairs")
    files = [source] if source.is_file() else sorted(source.rglob("*.parquet"))
    if not files and not any((source / f"metadata.{kind}").is_file() for kind in ("jsonl", "csv")):
        raise PreferencesError(
            f"data.preferences: {source} holds neither parquet files nor images with a metadata.jsonl"
        )
    where: dict[str, Any] = {"data_files": {"train": [str(f) for f in files]}} if files else {"data_dir": str(source)}
    try:
        dataset: Any = load_dataset("parquet" if files else "imagefolder", split="train", streaming=True, **where)
    except (DatasetsError, OSError, ValueError) as error:
        raise PreferencesError(f"data.preferences: {source} cannot be read: {error}") from error
    missing = [name for name in COLUMNS if name not in (dataset.column_names or ())]
    if missing:
        raise PreferencesError(
            f"data.preferences: {source} has no column {missing[0]!r}; a preference set has {', '.join(COLUMNS)}"
        )
    for name in COLUMNS[:2]:
        if isinstance((dataset.features or {}).get(name), Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    return dataset


def _row(row: dict[str, Any], where: str) -> Row:
    labels = row["label_0"], row["label_1"]
    if any(not isinstance(label, int | float) or label != label for label in labels):
        raise PreferencesError(f"data.preferences: {where} has the labels {labels[0]!r} and {labels[1]!r}, no numbers")
    if not isinstance(row["caption"], str):
        raise PreferencesError(f"data.preferences: {where} has the caption {row['caption']!r}, which is no text")
    winner = None if labels[0] == labels[1] else int(labels[1] > labels[0])
    return Row(where, (_bytes(row["jpg_0"], where), _bytes(row["jpg_1"], where)), row["caption"], winner)


def _bytes(value: Any, where: str) -> bytes:
    if isinstance(value, dict):
        inside = value.get("bytes")
        value = Path(value["path"]).read_bytes() if inside is None and value.get("path") else inside
    if not isinstance(value, bytes):
        raise PreferencesError(f"data.preferences: {where} lacks an image")
    return value


class EncodedCache:
    """Latents of images and embeddings of captions on disk, each in a file that its content and the encoders name.

    Every image is encoded alone, so that its latent never depends on its batch, and kept in float16. Files are
    written by rename: whoever else encodes the same writes the same.
    """

    def __init__(self, folder: Path, policy: Policy, model: ModelConfig) -> None:
        self.folder, self._policy = folder, policy
        _, rows, columns = policy.latent_shape(model.height, model.width)
        factor = 1024 // policy.latent_shape(1024, 1024)[1]
        self._size = columns * factor, rows * factor
        salt = encoder_hash(model), model.dtype, str(model.max_sequence_length), str(self._size)
        self._salt = " ".join(salt).encode()

    def image(self, content: bytes, where: str) -> str:
        """The key of an image file's latent (C, H, W); raises PreferencesError where it is no image."""
        key = self._key(b"image", content)
        if not self._path(key).is_file():
            device = getattr(self._policy, "device", "cpu")
            latents = self._policy.encode_images(self._pixels(content, where)[None].to(device))
            self._store(key, {"latents": latents[0].half()})
        return key

    def caption(self, text: str) -> str:
        """The key of a caption's embeddings, (L, D) and (E,)."""
        key = self._key(b"caption", text.encode())
        if not self._path(key).is_file():
            condition = self._policy.encode_prompts((text,))
            self._store(key, {"tokens": condition.tokens_PLD[0], "pooled": condition.pooled_PE[0]})
        return key

    def read(self, key: str) -> dict[str, Tensor]:
        return load_file(self._path(key))

    def _pixels(self, content: bytes, where: str) -> Tensor:
        """The middle of the picture in the run's size: uint8 (H, W, 3)."""
        from PIL import Image, ImageOps

        try:
            with Image.open(io.BytesIO(content)) as image:
                fitted = ImageOps.fit(image.convert("RGB"), self._size, Image.Resampling.LANCZOS)
        except (OSError, ValueError, SyntaxError) as error:
            raise PreferencesError(
                f"data.preferences: {where} holds no readable image ({error}); repair or remove the row"
            ) from error
        return torch.from_numpy(np.array(fitted))

    def _key(self, kind: bytes, content: bytes) -> str:
        return hashlib.sha256(b"\0".join((kind, self._salt, content))).hexdigest()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _store(self, key: str, tensors: dict[str, Tensor]) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.part")
        save_tensors(tensors, draft)
        draft.replace(path)


class PairSampler:
    """Draws the pairs of an iteration: a shuffle, walked without replacement and reshuffled each pass.

    A pair is the keys of winner, loser and caption. ``metrics`` counts them, and the ties that were left out.
    """

    def __init__(
        self, pairs: Sequence[tuple[str, str, str]], cache: EncodedCache, *, count: int, seed: int, ties: int = 0
    ) -> None:
        self._pairs, self._cache, self._count, self._seed = list(pairs), cache, count, seed
        self._null = cache.read(cache.caption(""))
        self.metrics = {"preferences/pairs": float(len(pairs)), "preferences/ties": float(ties)}

    def __len__(self) -> int:
        return len(self._pairs)

    def batch(self, iteration: int) -> PreferencePairs:
        """``count`` pairs, a function of seed and iteration; its ``seed`` is one as well."""
        chosen = [self._pairs[i] for i in self._draw(iteration)]
        rows = {key: row for row, key in enumerate(dict.fromkeys(caption for _, _, caption in chosen))}
        captions = [self._cache.read(key) for key in rows]
        winner, loser = (
            torch.stack([self._cache.read(pair[which])["latents"].float() for pair in chosen]) for which in (0, 1)
        )
        condition = Condition(
            tokens_PLD=torch.stack([caption["tokens"] for caption in captions]),
            pooled_PE=torch.stack([caption["pooled"] for caption in captions]),
            index_N=torch.tensor([rows[caption] for _, _, caption in chosen]),
            null_LD=self._null["tokens"],
            null_E=self._null["pooled"],
        )
        return PreferencePairs(winner, loser, condition, seeded(self._seed, 37, iteration).initial_seed())

    def _draw(self, iteration: int) -> list[int]:
        turns = range(iteration * self._count, (iteration + 1) * self._count)
        size = len(self)
        passes = {turn // size for turn in turns}
        orders = {p: torch.randperm(size, generator=seeded(self._seed, 41, p)).tolist() for p in passes}
        return [orders[turn // size][turn % size] for turn in turns]


def load_pairs(config: AlignConfig, policy: Policy, *, rank: int = 0, world_size: int = 1) -> PairSampler:
    """The sampler of a run, after encoding with ``policy`` what no earlier run has encoded.

    Raises:
        PreferencesError: the set is missing or malformed, or all of its pairs are ties.
    """
    assert config.data.preferences is not None
    source = Path(config.data.preferences)
    cache = EncodedCache(Path(config.data.preferences_cache or f"{source}.cache"), policy, config.model)
    if world_size > 1:  # each rank its own share first, so that they need not all encode everything
        for row in islice(read_rows(source), rank, None, world_size):
            _encode(row, cache)
    encoded = [_encode(row, cache) for row in read_rows(source)]
    pairs = [pair for pair in encoded if pair is not None]
    ties = len(encoded) - len(pairs)
    if not pairs:
        what = f"all {ties} pairs of {source} are ties" if ties else f"{source} holds no pair"
        raise PreferencesError(f"data.preferences: {what}; there is nothing to learn from")
    return PairSampler(pairs, cache, count=config.data.groups_per_iteration, seed=config.seed, ties=ties)


def _encode(row: Row, cache: EncodedCache) -> tuple[str, str, str] | None:
    if row.winner is None:
        return None
    keys = [cache.image(content, f"{row.where}, jpg_{i}") for i, content in enumerate(row.images)]
    return keys[row.winner], keys[1 - row.winner], cache.caption(row.caption)
