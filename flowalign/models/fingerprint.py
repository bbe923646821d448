"""Hashes of the files that encode images and prompts, which an export in another precision keeps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open

from flowalign.config.sections import ModelConfig
from flowalign.models.directory import family_of_model

TRAINED = ("transformer", "scheduler")
SCALES = ("scaling_factor", "shift_factor")
PRECISIONS = ("float32", "bfloat16", "float16")

Encoders = Callable[[str], str]  # a precision -> a hash


def encoder_hash(model: ModelConfig) -> str:
    """Return the sha256 over all parts of a pipeline directory but transformer and scheduler.

    Weights count as float32, tokenizers by their vocabulary: saving a pipeline anew may change precision, key order
    and padding, none of which changes what the same call encodes. Other files of other parts count byte by byte.
    """
    root = Path(model.path)
    parts = (path for path in root.iterdir() if path.is_dir() and path.name not in TRAINED)
    return _fingerprint(_kind(model), parts, torch.float32)


def encoders_of(model: ModelConfig) -> Encoders:
    """Return the hash of the files that decide what ``model`` encodes to, its weights rounded as asked."""
    family, root = family_of_model(model), Path(model.path)

    def rounded(precision: str) -> str:
        parts = [root / name for name in family.encoder_parts if (root / name).is_dir()]
        return _fingerprint(_kind(model), parts, getattr(torch, precision))

    return cache(rounded)


def _kind(model: ModelConfig) -> str:
    return model.type or family_of_model(model).name


def same_encoders(own: Encoders, others: Encoders) -> bool:
    """Tell whether both are of the same files, or one is a copy of the other in half precision."""
    return any(own(precision) == others(precision) for precision in PRECISIONS)


def _fingerprint(kind: str, parts: Iterable[Path], dtype: torch.dtype) -> str:
    digest = hashlib.sha256(kind.encode())
    for part in sorted(parts):
        digest.update(part.name.encode())
        if any(part.glob("*.safetensors")):
            _weights(part, digest, dtype)
        elif part.name.startswith("tokenizer"):
            digest.update(_vocabulary(part))
        else:
            for path in _files(part):
                digest.update(path.relative_to(part).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _weights(part: Path, digest: hashlib._Hash, dtype: torch.dtype) -> None:
    """Hash every tensor by name, whatever file it lies in, and an autoencoder's scale and shift."""
    where = {}
    for path in sorted(part.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    for name in sorted(where):
        with safe_open(where[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        wide = tensor.to(dtype) if tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(wide.shape)}".encode())
        digest.update(wide.contiguous().view(-1).view(torch.uint8).numpy().data)
    config = part / "config.json"
    known = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    digest.update(json.dumps([known.get(key) for key in SCALES]).encode())


def _vocabulary(part: Path) -> bytes:
    """Return the vocabulary as a fast tokenizer's file or a slow one's has it; the bytes of whatever else there is."""
    fast, slow = part / "tokenizer.json", part / "vocab.json"
    if fast.is_file():
        return json.dumps(json.loads(fast.read_text(encoding="utf-8"))["model"]["vocab"], sort_keys=True).encode()
    if slow.is_file():
        return json.dumps(json.loads(slow.read_text(encoding="utf-8")), sort_keys=True).encode()
    return b"".join(path.read_bytes() for path in _files(part))


def _files(part: Path) -> Iterator[Path]:
    return (path for path in sorted(part.rglob("*")) if path.is_file())
