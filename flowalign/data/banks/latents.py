"""Latent banks on disk: shards of safetensors, a list of prompts, and a manifest with the sha256 of each file.

``<dir>/manifest.json`` names all other files::

    {"format": "flowalign-latents", "version": 1, "encoder": sha256 or null, "captions": ["original", …], "count": M,
     "noise": false, "buckets": [{"bucket": "64x64", "count": M, …}],
     "shards": [{"file", "sha256", "bytes", "count", "bucket"}],
     "prompts": {"file", "sha256", "bytes", "count"}, "embeddings": null or {…, "max_sequence_length"}, …}

A bucket is HEIGHTxWIDTH of its latents. ``shard-00000.safetensors`` holds ``latents`` float16 (n, C, h, w), for each
kind of caption ``caption.<name>`` int64 (n,), rows of ``prompts.json``, and where there is one ``noise`` like the
latents. ``embeddings.safetensors`` holds ``tokens`` (P, L, D), ``pooled`` (P, E), ``null_tokens`` and ``null_pooled``.

The layout before that, one ``latents.safetensors`` with ``latents`` and ``prompt`` beside ``prompts.json``, is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flowalign.data.banks.bank import Drawn, Embeddings, LatentBank, LatentsError, Mapped, Shard
from flowalign.data.banks.captions import table_of
from flowalign.data.banks.files import write_json, write_tensors
from flowalign.data.images import ORIGINAL
from flowalign.record.files import stays_below
from flowalign.record.textfiles import TextError, read_json, read_object

__all__ = ["Drawn", "Embeddings", "LatentBank", "LatentsError", "Shard", "load_bank", "save_bank"]

FORMAT, VERSION = "flowalign-latents", 1
MANIFEST, PROMPTS, EMBEDDINGS = "manifest.json", "prompts.json", "embeddings.safetensors"
CAPTION = "caption."


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def write_shard(directory: Path, number: int, shard: Shard) -> dict[str, Any]:
    """Write one shard, atomically; returns its entry in the manifest. Raises DiskError."""
    tensors = {"latents": shard.latents.half(), **{CAPTION + name: rows for name, rows in shard.rows.items()}}
    if shard.noise is not None:
        tensors["noise"] = shard.noise.half()
    entry = write_tensors(directory / shard_name(number), tensors)
    return {**entry, "count": len(shard), "bucket": "{}x{}".format(*shard.size)}


def write_manifest(
    directory: Path,
    shards: Sequence[Mapping[str, Any]],
    prompts: Sequence[str],
    *,
    captions: Sequence[str],
    noise: bool = False,
    encoder: str | None = None,
    embeddings: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the prompts and, last of all, the manifest that makes a bank of the shards; returns it."""
    counts: dict[str, int] = {}
    for shard in shards:
        counts[shard["bucket"]] = counts.get(shard["bucket"], 0) + int(shard["count"])
    listed = write_json(directory / PROMPTS, list(prompts))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "encoder": encoder,
        "captions": list(captions),
        "count": sum(counts.values()),
        "noise": noise,
        "buckets": [{"bucket": bucket, "count": count} for bucket, count in counts.items()],
        "prompts": {**listed, "count": len(prompts)},
        "embeddings": embeddings,
        **(more or {}),
        "shards": list(shards),
    }
    write_json(directory / MANIFEST, manifest)
    return manifest


def save_bank(directory: Path, bank: LatentBank) -> None:
    """Write a bank; one that lay there before stops being one first. Raises DiskError."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, "latents.safetensors"):
        (directory / name).unlink(missing_ok=True)
    entries = [write_shard(directory, number, shard) for number, shard in enumerate(bank.shards)]
    write_manifest(directory, entries, bank.prompts, captions=bank.captions, noise=bank.has_noise, encoder=bank.encoder)


def load_bank(directory: Path, *, verify: bool = True) -> LatentBank:
    """Open a bank; latents are mapped into memory and read when drawn.

    The size of every file is compared with the manifest, and with ``verify`` its sha256, which reads all of it.

    Raises:
        LatentsError: a file is missing, is not what was written, or does not fit the others.
    """
    if not (directory / MANIFEST).is_file():
        return _old_layout(directory)
    manifest = _manifest(directory)
    for entry in (*manifest["shards"], manifest["prompts"], *filter(None, [manifest["embeddings"]])):
        _check_file(directory, entry, verify)
    prompts = _prompts(directory / PROMPTS)
    files = [entry["file"] for entry in manifest["shards"]]
    shards = [_shard(directory / entry["file"], entry, manifest) for entry in manifest["shards"]]
    _check_rows(directory / PROMPTS, len(prompts), dict(zip(files, shards, strict=True)))
    if not sum(map(len, shards)):
        raise LatentsError(f"latents: {directory / MANIFEST} counts 0 latents; the bank is empty")
    embeddings = manifest["embeddings"] and _embeddings(directory, manifest["embeddings"], len(prompts))
    return LatentBank.of_shards(shards, prompts, embeddings=embeddings or None, encoder=manifest["encoder"])


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = read_object(path)
        known = manifest["format"] == FORMAT and manifest["version"] == VERSION
        named = (*manifest["shards"], manifest["prompts"], *filter(None, [manifest["embeddings"]]))
        files = [entry["file"] for entry in named]
    except TextError as error:
        raise LatentsError(f"latents: {path} is no manifest of a latent bank ({error})") from error
    except (KeyError, TypeError) as error:
        raise LatentsError(f"latents: {path} is no manifest of a latent bank ({error!r})") from error
    if not known:
        said = f"{manifest['format']} version {manifest['version']}"
        raise LatentsError(f"latents: {path} is of {said}, this program reads {FORMAT} version {VERSION}")
    if not manifest["shards"]:
        raise LatentsError(f"latents: {path} names no shard; the bank is empty")
    if outside := [file for file in files if not stays_below(file) or Path(file).name != file]:
        raise LatentsError(f"latents: {path} names {outside[0]}; the files of a bank lie beside its manifest")
    return manifest


def _prompts(path: Path) -> list[str]:
    try:
        listed = read_json(path)
    except TextError as error:
        raise LatentsError(f"latents: {error}") from error
    if not isinstance(listed, list) or not all(isinstance(prompt, str) for prompt in listed):
        raise LatentsError(f"latents: {path} holds no list of texts; make the bank again")
    return listed


def _check_file(directory: Path, entry: Mapping[str, Any], verify: bool) -> None:
    path, advice = directory / entry["file"], "copy the file again from where the bank was made, or make the bank again"
    if not path.is_file():
        raise LatentsError(f"latents: {path} is missing, which {MANIFEST} names; {advice}")
    if path.stat().st_size != entry["bytes"]:
        said = f"has {path.stat().st_size} bytes, {MANIFEST} says {entry['bytes']}"
        raise LatentsError(f"latents: {path} {said}; {advice}")
    if verify:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != entry["sha256"]:
            said = f"has sha256 {found}, {MANIFEST} expects {entry['sha256']}"
            raise LatentsError(f"latents: {path} {said}: the file is damaged or another one; {advice}")


def _shard(path: Path, entry: Mapping[str, Any], manifest: Mapping[str, Any]) -> Shard:
    file = _mapped(path)
    tensors = _tensors(path, ["latents", *(CAPTION + name for name in manifest["captions"])])
    rows = {name: tensors[CAPTION + name] for name in manifest["captions"]}
    shard = Shard(tensors["latents"], rows, tensors.get("noise"), file)
    found = {"count": len(shard), "bucket": "{}x{}".format(*shard.size), "noise": shard.noise is not None}
    said = {"count": entry["count"], "bucket": entry["bucket"], "noise": manifest["noise"]}
    lengths = {len(one) for one in (*rows.values(), *([] if shard.noise is None else [shard.noise]))}
    if found != said or lengths != {len(shard)}:
        raise LatentsError(f"latents: {path} holds {found}, {MANIFEST} says {said}")
    return shard


def _mapped(path: Path) -> Mapped:
    try:
        return Mapped.of(path)
    except OSError as error:
        raise LatentsError(f"latents: {path} cannot be read ({error.strerror}); make the bank again") from error


def _tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise LatentsError(f"latents: {path} cannot be read ({error}); make the bank again") from error
    if lacking := [name for name in names if name not in tensors]:
        raise LatentsError(f"latents: {path} has no tensor {lacking[0]!r}; it holds {', '.join(tensors)}")
    return tensors


def _check_rows(names: Path, num_prompts: int, shards: Mapping[str, Shard]) -> None:
    for file, shard in shards.items():
        for rows in shard.rows.values():
            if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < num_prompts:
                raise LatentsError(f"latents: {names} has {num_prompts} prompts, {file} refers to more")


def _embeddings(directory: Path, entry: Mapping[str, Any], num_prompts: int) -> Embeddings:
    path = directory / entry["file"]
    file = _mapped(path)
    tensors = _tensors(path, ["tokens", "pooled", "null_tokens", "null_pooled"])
    if len(tensors["tokens"]) != num_prompts or len(tensors["pooled"]) != num_prompts:
        raise LatentsError(f"latents: {path} has {len(tensors['tokens'])} rows for {num_prompts} prompts")
    return Embeddings(table_of(tensors), int(entry["max_sequence_length"]), file)


def _old_layout(directory: Path) -> LatentBank:
    weights, names = directory / "latents.safetensors", directory / PROMPTS
    if not weights.is_file() and not names.is_file():
        raise LatentsError(f"latents: {directory / MANIFEST} is missing; make the bank first (flowalign precompute)")
    for path in (weights, names):
        if not path.is_file():
            raise LatentsError(f"latents: {path} is missing; make the bank again")
    file = _mapped(weights)
    tensors = _tensors(weights, ["latents", "prompt"])
    prompts = _prompts(names)
    shard = Shard(tensors["latents"], {ORIGINAL: tensors["prompt"]}, tensors.get("noise"), file)
    _check_rows(names, len(prompts), {weights.name: shard})
    return LatentBank.of_shards([shard], prompts)
