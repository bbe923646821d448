"""The format between reward client and server: a JSON header and raw bytes, never pickle.

    request:  b"FAQ1" | header length, uint32 little-endian | header | uint8 images (N, H, W, 3)
    response: b"FAS1" | header length, uint32 little-endian | header | float64 little-endian (rewards, N)

The request's header is ``{"shape", "prompts", "metadata"}``, the response's ``{"names", "count"}``.
NaN and ±Inf travel as they are: the caller's ``validate_scores`` masks and counts them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.interface import MAX_SCORES, Asked, InputError, Metadata, ScorerError, check_inputs

CONTENT_TYPE = "application/x-flowalign-score"
_REQUEST, _RESPONSE = b"FAQ1", b"FAS1"
_PREFIX = struct.Struct("<4sI")


@dataclass(frozen=True)
class Limits:
    """The limits of what is read: bytes in all, bytes of the header, pixels an image, pixels a side at least, images.

    Of a form's files the pixels in all are limited.
    """

    max_bytes: int = 256 * 2**20
    max_header_bytes: int = 2 * 2**20
    max_pixels: int = 4096 * 4096
    min_side: int = 8
    max_count: int = 1024
    max_decoded_pixels: int = 4 * 4096 * 4096


DEFAULT_LIMITS = Limits()


class WireError(ScorerError):
    """Bytes that are not a message of this protocol."""

    kind = "malformed"


class TooLarge(WireError):
    """A message over one of the limits."""

    kind = "too_large"


def encode_request(asked: Asked) -> bytes:
    """Encode a question that needs no more than images, prompts and metadata.

    Raises ``InputError`` for arrays that do not fit and for what does not travel, ``WireError`` for metadata that is
    not JSON.
    """
    check_inputs(asked)
    for field in ("references", "groups", "latents", "pixels"):
        if getattr(asked, field) is not None:
            raise InputError(f"{field} do not travel over HTTP; ask a scorer that needs them where the run scores")
    header = {"shape": list(asked.images.shape), "prompts": asked.prompts, "metadata": asked.metadata}
    return _pack(_REQUEST, header, np.ascontiguousarray(asked.images).tobytes())


def decode_request(data: bytes | bytearray, limits: Limits = DEFAULT_LIMITS) -> Asked:
    """Decode a question; its images share ``data``'s memory.

    Raises ``WireError``, ``TooLarge`` or ``InputError``.
    """
    header, payload = _unpack(_REQUEST, data, limits)
    shape = header.get("shape")
    if not isinstance(shape, list) or not _is_shape(shape):
        raise WireError(f"request header: shape is {_show(shape)}; send [N, H, W, 3] of positive integers")
    count, height, width, _ = shape
    check_geometry(count, height, width, limits)
    if len(payload) != count * height * width * 3:
        raise WireError(f"{len(payload)} image bytes for shape {shape}; send {count * height * width * 3}")
    prompts, metadata = check_texts(header.get("prompts"), header.get("metadata"), count, "request header")
    check_side(height, width, limits)
    return Asked(np.frombuffer(payload, np.uint8).reshape(shape), prompts, metadata)


def check_side(height: int, width: int, limits: Limits = DEFAULT_LIMITS) -> None:
    """Raise ``InputError`` for images too small to show anything."""
    if min(height, width) < limits.min_side:
        raise InputError(f"images of {height}×{width} pixels; send at least {limits.min_side} pixels a side")


def check_geometry(count: int, height: int, width: int, limits: Limits = DEFAULT_LIMITS) -> None:
    """Raise ``TooLarge``."""
    if count > limits.max_count:
        raise TooLarge(f"{count} images in one request, limit {limits.max_count}; send smaller batches")
    if height * width > limits.max_pixels:
        raise TooLarge(f"images of {height}×{width} pixels, limit {limits.max_pixels} pixels; send smaller images")
    if count * height * width * 3 > limits.max_bytes:
        raise TooLarge(f"{count} images of {height}×{width} pixels pass {limits.max_bytes} bytes; send fewer at once")


def check_texts(prompts: Any, metadata: Any, count: int, where: str) -> tuple[list[str], list[Metadata]]:
    """Check ``count`` prompts and metadata objects from outside. Raise ``WireError`` that names ``where``."""
    if isinstance(prompts, list) and len(prompts) != count:
        raise WireError(f"{where}: {len(prompts)} prompts for {count} images; send one an image")
    if not isinstance(prompts, list) or not all(_is_text(p) for p in prompts):
        raise WireError(f"{where}: prompts are not a list of {count} valid Unicode strings")
    if not isinstance(metadata, list) or len(metadata) != count or not all(isinstance(m, dict) for m in metadata):
        raise WireError(f"{where}: metadata is not a list of {count} objects")
    return prompts, metadata


def encode_response(scores: Mapping[str, NDArray[np.float64]]) -> bytes:
    """Encode arrays (N,) of one length, as ``rewards.interface.call`` returns them."""
    table = np.stack([np.asarray(array, "<f8") for array in scores.values()])
    return _pack(_RESPONSE, {"names": list(scores), "count": table.shape[1]}, table.tobytes())


def decode_response(data: bytes, count: int) -> dict[str, NDArray[np.float64]]:
    """Decode float64 arrays of ``count`` scores a reward. Raise ``WireError``, also where the count differs."""
    header, payload = _unpack(_RESPONSE, data, DEFAULT_LIMITS)
    names = header.get("names")
    if not isinstance(names, list) or not names or not all(_is_text(n) and n for n in names):
        raise WireError(f"response header: names are {_show(names)}, not a list of strings")
    if len(names) > MAX_SCORES:
        raise WireError(f"response header: {len(names)} names, limit {MAX_SCORES}; let the reward answer fewer")
    if len(set(names)) != len(names):
        raise WireError(f"response header: repeated names in {_show(names)}")
    if type(header.get("count")) is not int or header["count"] != count or len(payload) != 8 * count * len(names):
        got = _show(header.get("count"))
        raise WireError(f"response holds {got} scores a reward in {len(payload)} bytes, expected {count} a reward")
    table = np.frombuffer(payload, "<f8").reshape(len(names), count).astype(np.float64)
    return dict(zip(names, table, strict=True))


def _pack(magic: bytes, header: dict[str, Any], payload: bytes) -> bytes:
    try:
        text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(
            f"prompts or metadata are not plain JSON ({error}); use strings, numbers, lists, dicts"
        ) from error
    return b"".join((_PREFIX.pack(magic, len(text)), text, payload))


def _unpack(magic: bytes, data: bytes | bytearray, limits: Limits) -> tuple[dict[str, Any], memoryview]:
    if len(data) > limits.max_bytes:
        raise TooLarge(f"message of {len(data)} bytes, limit {limits.max_bytes}; send smaller batches")
    if len(data) < _PREFIX.size:
        raise WireError(
            f"message of {len(data)} bytes is shorter than its {_PREFIX.size}-byte prefix; "
            "send the form of rewards/wire.py, or multipart/form-data with images and prompts"
        )
    found, length = _PREFIX.unpack_from(data)
    if found != magic:
        raise WireError(f"message starts with {found!r}, not {magic!r}: not the format of rewards/wire.py")
    if length > limits.max_header_bytes:
        raise TooLarge(f"header of {length} bytes, limit {limits.max_header_bytes}; send smaller batches")
    view = memoryview(data)[_PREFIX.size :]
    if length > len(view):
        raise WireError(f"header of {length} bytes declared, {len(view)} bytes received")
    try:
        header = json.loads(bytes(view[:length]).decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise WireError(f"header is not JSON in UTF-8 ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise WireError(f"header is a JSON {type(header).__name__}, not an object")
    return header, view[length:]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Raise WireError where it has a key twice, of which readers take one or the other."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise WireError(f"header: the key {_show(key)} is there twice; send it once")
        found[key] = value
    return found


def _is_shape(shape: list[Any]) -> bool:
    return len(shape) == 4 and all(type(size) is int and size > 0 for size in shape) and shape[3] == 3


def _is_text(value: Any) -> bool:
    """Tell whether a string is without lone surrogates, which JSON can spell and UTF-8 cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _show(value: Any) -> str:
    return repr(value)[:60]
