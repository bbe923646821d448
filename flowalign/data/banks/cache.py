"""Latents of images and embeddings of captions on disk, so that each is computed once for all runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from flowalign.config.sections import ModelConfig
from flowalign.data.banks.buckets import Bucket, cut
from flowalign.data.banks.captions import NotEncoded
from flowalign.models.directory import family_of_model, open_directory
from flowalign.models.embeddings import EmbeddingStore
from flowalign.models.encoders import Encoders, text_rows
from flowalign.models.fingerprint import encoder_hash
from flowalign.record.disk import draft_of, on_disk, writing
from flowalign.record.files import save_tensors, tensors_size
from flowalign.types import Condition
from rewards.pictures import look, read


class EncodedCache:
    """Latents of images and embeddings of captions on disk, each in a file that its content and the encoders name.

    Every image is encoded alone, so that its latent never depends on its batch, and kept in float16. Files are
    written by rename: whoever else encodes the same writes the same. Without ``encoders`` what is missing raises
    NotEncoded. Captions lie in an `EmbeddingStore`.
    """

    def __init__(self, folder: Path, encoders: Encoders | None, model: ModelConfig, device: str = "cpu") -> None:
        self.folder, self._encoders, self._model = folder, encoders, model
        self._length, self._texts = model.max_sequence_length, EmbeddingStore(folder, model, device)
        self._earlier: set[str] = set()

    @cached_property
    def _size(self) -> Bucket:
        directory, model = open_directory(self._model), self._model
        _, rows, columns = directory.latent_shape(model.height, model.width)
        factor = directory.geometry.factor
        return Bucket(rows * factor, columns * factor)

    @cached_property
    def _salt(self) -> bytes:
        model, size = self._model, (self._size.width, self._size.height)
        return " ".join((encoder_hash(model), model.dtype, str(model.max_sequence_length), str(size))).encode()

    def image(self, content: bytes) -> str:
        """Return the key of an image file's latent (C, H, W). Raise PictureError where it is no picture.

        What 0.1 read otherwise (turned, transparent, of more than 8 bits) has another key, so that its latents are
        not taken for these.
        """
        key = self._key(b"image" if look(content).plain else b"picture", content)
        if not self._path(key).is_file():
            pixels = torch.from_numpy(cut(read(content), self._size, generator=None, crop=False, flip=False))
            encoders = self._own(key)
            latents = encoders.encode_images(pixels[None].to(encoders.device))
            self._store(key, {"latents": latents[0].half()})
        return key

    def caption(self, text: str) -> str:
        """Return the key of a caption's embedding; one that an earlier version has written serves as well."""
        key = self._texts.key(text, self._length)
        if self._texts.path(key).is_file():
            return key
        earlier = self._key(b"caption", text.encode())
        if self._path(earlier).is_file():
            self._earlier.add(earlier)
            return earlier
        self._texts.write(key, text, self._own(key).encode_text(text, self._length))
        return key

    def condition(self, keys: Sequence[str], negatives: Sequence[str] = ()) -> Condition:
        """Return the condition of samples by the keys of their captions, and of their negative ones, by default the
        empty caption's."""
        text, index = self._rows(keys)
        null, null_index = self._rows(negatives or [self.caption("")] * len(keys))
        return Condition(text, null, index, null_index)

    def _rows(self, keys: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Return a row for each distinct key, of the whole length, and which of them each key has."""
        places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        table = text_rows(family_of_model(self._model), [self._row(key) for key in places], self._length)
        return table, torch.tensor([places[key] for key in keys])

    def _row(self, key: str) -> dict[str, Tensor]:
        if key in self._earlier:
            return {name: row[None] for name, row in self.read(key).items()}
        found = self._texts.read(key)
        if found is None:
            raise NotEncoded(f"{self._path(key)} is missing, and nothing here encodes it")
        return found

    def _own(self, key: str) -> Encoders:
        if self._encoders is None:
            raise NotEncoded(f"{self._path(key)} is missing, and nothing here encodes it")
        return self._encoders

    def read(self, key: str) -> dict[str, Tensor]:
        return load_file(self._path(key))

    def _key(self, kind: bytes, content: bytes) -> str:
        return hashlib.sha256(b"\0".join((kind, self._salt, content))).hexdigest()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _store(self, key: str, tensors: dict[str, Tensor]) -> None:
        path = self._path(key)
        needed = on_disk([tensors_size(tensors)])
        with writing(str(path), path, needed):
            path.parent.mkdir(parents=True, exist_ok=True)
        with draft_of(path, needed=needed, shared=True) as draft:
            save_tensors(tensors, draft)
