"""Hashes of the files that encode images and prompts, which an export in another precision keeps.

`text_hash` alone is of the files that read texts, and of all that they say.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from flowalign.config.sections import ModelConfig
from flowalign.models.directory import INDEX, family_of_model
from flowalign.models.weights import loaded_files
from flowalign.record.disk import DiskError, folder_for, write_text
from flowalign.record.textfiles import read_object

TRAINED = ("transformer", "scheduler")
SCALES = ("scaling_factor", "shift_factor")
PRECISIONS = ("float32", "bfloat16", "float16")
BINARY = (".safetensors", ".bin", ".h5", ".msgpack")
# Where a file was saved, by what, and what a call sets anew each time.
UNSAID = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "padding", "truncation")
FRESH_S = 2.0  # a file that was changed so lately might be changed again within the same tick of its disk's clock

Encoders = Callable[[str], str]  # a precision -> a hash


def encoder_hash(model: ModelConfig) -> str:
    """Return the sha256 over all parts of a pipeline directory but transformer and scheduler.

    Weights count as float32, tokenizers by their vocabulary and chat template: saving a pipeline anew may change
    precision, key order and padding, none of which changes what the same call encodes. Other files of other parts count
    byte by byte.
    """
    root = Path(model.path)
    unread = {*TRAINED, *_left_out(root)}
    parts = (path for path in root.iterdir() if path.is_dir() and path.name not in unread)
    return _fingerprint(_kind(model), parts, torch.float32)


def encoders_of(model: ModelConfig) -> Encoders:
    """Return the hash of the files that decide what ``model`` encodes to, its weights rounded as asked."""
    family, root = family_of_model(model), Path(model.path)

    def rounded(precision: str) -> str:
        parts = _parts(root, family.encoder_parts)
        return _fingerprint(_kind(model), parts, getattr(torch, precision))

    return cache(rounded)


def text_hash(model: ModelConfig) -> str:
    """Return the sha256 over all that decides what texts are encoded to: weights as float32, configurations, tokenizers
    with their chat templates.

    Raises:
        ModelError: the family is not known.
    """
    digest = hashlib.sha256(json.dumps([_kind(model), _classes(model)]).encode())
    for part in _text_parts(model):
        digest.update(part.name.encode())
        if weighed := any(part.glob("*.safetensors")):
            _weights(part, digest, torch.float32)
        for path in _files(part):
            if not weighed or (path.suffix not in BINARY and ".safetensors.index." not in path.name):
                digest.update(path.relative_to(part).as_posix().encode() + _said(path))
    return digest.hexdigest()


def kept_text_hash(model: ModelConfig, folder: Path) -> str:
    """Return `text_hash`. Once known it lies in ``folder``, so that files nobody has touched are not read again."""
    stamp = _stamp(model)
    place = folder / "encoders" / f"{stamp}.txt"
    with suppress(OSError, ValueError):
        found = place.read_text(encoding="ascii")
        if len(found) == hashlib.sha256().digest_size * 2:
            return found
    found = text_hash(model)
    if _stamp(model, before=time.time() - FRESH_S) == stamp:
        with suppress(DiskError), folder_for(place.parent):
            write_text(place, found)
    return found


def _stamp(model: ModelConfig, before: float | None = None) -> str | None:
    """Return a hash of sizes, times and places on the disk; None where a file was changed later than ``before``."""
    facts: list[Any] = [_kind(model), _classes(model)]
    for part in _text_parts(model):
        for path in _files(part):
            state = path.stat()
            if before is not None and max(state.st_mtime, state.st_ctime) > before:
                return None
            where = part.name, path.relative_to(part).as_posix(), state.st_dev, state.st_ino
            facts.append((*where, state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _text_parts(model: ModelConfig) -> list[Path]:
    return _parts(Path(model.path), family_of_model(model).text)


def _classes(model: ModelConfig) -> list[Any]:
    """Return the class that the index names for each text encoder; null is that of one which is left out."""
    index = _index(Path(model.path))
    return [index.get(name) for name in family_of_model(model).text if name.startswith("text_encoder")]


def _parts(root: Path, names: Iterable[str]) -> list[Path]:
    """Return the folders of those parts that the pipeline has."""
    unread = _left_out(root)
    return sorted(root / name for name in names if name not in unread and (root / name).is_dir())


def _left_out(root: Path) -> set[str]:
    """Return the parts that the index names as null: nothing is loaded of their folders, which may still be there."""
    return {name for name, entry in _index(root).items() if isinstance(entry, list) and not any(entry)}


def _index(root: Path) -> Mapping[str, Any]:
    file = root / INDEX
    return read_object(file) if file.is_file() else {}


def _said(path: Path) -> bytes:
    """Return what a file says: of JSON the values, whatever their order, but for what says nothing of a text."""
    content = path.read_bytes()
    if path.suffix != ".json":
        return content
    try:
        return json.dumps(_telling(json.loads(content)), sort_keys=True).encode()
    except ValueError:
        return content


def _telling(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _telling(inner) for name, inner in value.items() if name not in UNSAID}
    return value


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
            digest.update(_vocabulary(part) + _template(part))
        else:
            for path in _files(part):
                digest.update(path.relative_to(part).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _weights(part: Path, digest: hashlib._Hash, dtype: torch.dtype) -> None:
    """Hash every tensor by name, whatever file it lies in, and an autoencoder's scale and shift."""
    where = {}
    for path in loaded_files(part):
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


def _template(part: Path) -> bytes:
    """Return a tokenizer's chat template, whichever file it lies in; empty where it has none."""
    own, config = part / "chat_template.jinja", part / "tokenizer_config.json"
    if own.is_file():
        return own.read_bytes()
    said = read_object(config).get("chat_template") if config.is_file() else None
    return (said if isinstance(said, str) else json.dumps(said)).encode() if said else b""


def _files(part: Path) -> Iterator[Path]:
    return (path for path in sorted(part.rglob("*")) if path.is_file())
