"""A multipart form as a batch: for curl, browsers and other languages."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from rewards.interface import Asked, InputError
from rewards.serving.pictures import decode, look_at
from rewards.wire import Limits, WireError, check_texts

_FIELDS = ("images", "prompts", "metadata")
_BOUNDARY = re.compile(r"[\w'()+,./:=? -]{1,70}", re.ASCII)
_PIECE = 1 << 20


async def read_form(
    headers: Headers, body: bytearray, limits: Limits, decoding: Callable[[int], Awaitable[None]]
) -> Asked:
    """Read the question of a form: fields ``images`` (files), ``prompts`` and ``metadata``.

    Prompts are a JSON list or one plain field an image, metadata are a JSON list. Texts are UTF-8. ``decoding`` is told
    how many bytes the pictures will take, once all that is cheap was looked at, and may take its time.

    Raises:
        WireError: no valid form, UTF-8 or JSON. TooLarge, InputError: as ``rewards.serving.pictures.look_at``.
    """

    async def pieces() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), _PIECE):
            yield bytes(body[start : start + _PIECE])

    parser = MultiPartParser(
        _as_latin_1(headers.get("content-type", "")),
        pieces(),
        max_files=limits.max_count,
        max_fields=limits.max_count + 1,
        max_part_size=limits.max_header_bytes,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise WireError(f"no valid multipart form ({str(error)[:100]})") from error
    try:
        if unknown := sorted(set(form) - set(_FIELDS)):
            raise WireError(f"form field {unknown[0][:40]!r} is unknown; send images, prompts and metadata")
        files = [await part.read() for part in form.getlist("images") if isinstance(part, UploadFile)]
        if not files:
            raise InputError("no images; send at least one file")
        prompts, metadata = _prompts(form, len(files)), _metadata(form, len(files))
        texts = check_texts(prompts, metadata, len(files), "form")
        await decoding(await run_in_threadpool(look_at, files, limits))
        return Asked(await run_in_threadpool(decode, files), *texts)
    finally:
        await form.close()


def _as_latin_1(content_type: str) -> Headers:
    """Return the form's boundary with an encoding in which the parser keeps every byte.

    A declared one may be a codec that takes hours, and the parser guesses where text does not decode.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"").decode("latin-1")
    if not _BOUNDARY.fullmatch(boundary):
        raise WireError("no valid multipart form (its content type names no boundary)")
    return Headers({"content-type": f'multipart/form-data; boundary="{boundary}"; charset=latin-1'})


def _prompts(form: FormData, count: int) -> Any:
    given = [_text("prompts", value) for value in form.getlist("prompts")]
    if len(given) == 1 and given[0].lstrip().startswith("["):
        return _json("prompts", given[0])
    if len(given) != count:
        raise InputError(f"{count} images and {len(given)} prompts; send one a picture, or one field with a JSON list")
    return given


def _metadata(form: FormData, count: int) -> Any:
    given = form.get("metadata")
    return [{} for _ in range(count)] if given is None else _json("metadata", _text("metadata", given))


def _text(field: str, value: UploadFile | str) -> str:
    """Return a field's own bytes as UTF-8."""
    try:
        if isinstance(value, str):
            return value.encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        pass
    raise WireError(f"form field {field} is no text in UTF-8")


def _json(field: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"form field {field} is no JSON list") from error
