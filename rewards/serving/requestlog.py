"""A line for each request of a reward server: who asked for what, and what was answered."""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rewards.printable import printable

LOG = logging.getLogger("rewards.requests")
IMAGES = "rewards.images"  # of a request's scope: how many were scored
_LONGEST = 300


def log_requests(wanted: bool) -> None:
    """Write a line for each request on standard error, or none."""
    LOG.setLevel(logging.INFO if wanted else logging.WARNING)
    if wanted and not LOG.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        LOG.addHandler(handler)
        LOG.propagate = False


class RequestLog:
    """Writes the lines, at INFO: address, request, status, images or, as the client was told, the reason."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not LOG.isEnabledFor(logging.INFO):
            await self._app(scope, receive, send)
            return
        began, status, body = time.monotonic(), 500, bytearray()

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif status >= 400:
                body.extend(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            LOG.info("%s", _line(scope, status, body, time.monotonic() - began))


def _line(scope: Scope, status: int, body: bytearray, seconds: float) -> str:
    host, port = scope["client"] or ("unknown", 0)
    images = scope.get(IMAGES)
    said = f", {images} image{'s' * (images != 1)}" if images is not None else ""
    if status >= 400:
        said = f", {_reason(body)}"
    text = printable(f"{host}:{port} {scope['method']} {scope['path']}")
    return f"{_cut(text)}: {status}{_cut(printable(said))}, {seconds:.3f} s"


def _reason(body: bytearray) -> str:
    found: dict[str, Any] = {}
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        found = dict(json.loads(bytes(body))["error"])
    return f"{found['type']}: {found['message']}" if {"type", "message"} <= found.keys() else "no answer was sent"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
