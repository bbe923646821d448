"""A reward server: ``python -m rewards.serve SPEC --port 8000`` runs one scorer behind HTTP.

``POST /score`` takes and returns the bytes of ``rewards.wire``; ``GET /health`` and ``GET /info`` answer
JSON. Every error is JSON, ``{"error": {"type", "message"}}``, without a trace; the trace is in the log.
"""

from __future__ import annotations

import argparse
import hmac
import ipaddress
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from rewards.interface import InputError, Scorer, ScorerError, SpecError, call, set_up
from rewards.resolve import resolve
from rewards.wire import CONTENT_TYPE, DEFAULT_LIMITS, Limits, TooLarge, WireError, decode_request, encode_response

_log = logging.getLogger("rewards.serve")
_STATUS = {
    TooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    WireError: HTTPStatus.BAD_REQUEST,
    InputError: HTTPStatus.UNPROCESSABLE_ENTITY,
}


class PortInUse(ScorerError):
    """Nothing can listen there."""

    kind = "port_in_use"


def create_app(name: str, scorer: Scorer, *, token: str | None = None, limits: Limits = DEFAULT_LIMITS) -> FastAPI:
    """The server of one scorer that is already set up; it scores one batch at a time."""
    app = FastAPI(title=f"reward server: {name}", docs_url=None, redoc_url=None, openapi_url=None)
    turn = threading.Lock()

    def score(body: bytes) -> bytes:
        images, prompts, metadata = decode_request(body, limits)
        with turn:
            return encode_response(call(name, scorer, images, prompts, metadata))

    @app.post("/score")
    async def post_score(request: Request) -> Response:
        _authorize(request, token)
        content = await run_in_threadpool(score, await _body(request, limits))
        return Response(content, media_type=CONTENT_TYPE)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/info")
    async def info() -> dict[str, Any]:
        scale = getattr(scorer, "range", None)
        return {
            "name": name,
            "scorer": type(scorer).__name__,
            "range": None if scale is None else [None if abs(edge) == float("inf") else edge for edge in scale],
            "content_type": CONTENT_TYPE,
            "limits": asdict(limits),
        }

    app.add_exception_handler(ScorerError, _scorer_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    return app


async def _body(request: Request, limits: Limits) -> bytes:
    """The whole body, refused as soon as its declared or received length passes the limit."""
    too_large = TooLarge(f"body over the limit of {limits.max_bytes} bytes; send smaller batches")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limits.max_bytes:
        raise too_large
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limits.max_bytes:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


def _authorize(request: Request, token: str | None) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
        raise HTTPException(HTTPStatus.UNAUTHORIZED, "wrong or missing token; send `Authorization: Bearer TOKEN`")


def _error(status: int, kind: str, message: str) -> JSONResponse:
    # A refused body may still be on its way; without this the next request would read its rest.
    headers = {"Connection": "close"} if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE else None
    return JSONResponse({"error": {"type": kind, "message": message}}, status, headers=headers)


def _scorer_error(request: Request, error: Exception) -> JSONResponse:
    status = next((code for cls, code in _STATUS.items() if isinstance(error, cls)), HTTPStatus.INTERNAL_SERVER_ERROR)
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.error("%s", error, exc_info=error.__cause__)
    return _error(status, getattr(error, "kind", "scorer_error"), str(error))


def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, HTTPStatus(error.status_code).name.lower(), str(error.detail))


def _unexpected(request: Request, error: Exception) -> JSONResponse:
    return _error(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", "the server failed; its log has the cause")


def serve(
    spec: str | Mapping[str, Any],
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    base_dir: str | Path = ".",
    device: str = "cpu",
    token: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    announce: Callable[[str], None] = print,
) -> None:
    """Serve one scorer until interrupted; port 0 takes a free one. ``announce`` gets the address once it listens.

    Raises ``SpecError`` for a spec that does not resolve or an address beyond this machine without a
    token, ``PortInUse`` for a port that is taken.
    """
    if token is None and not _is_loopback(host):
        raise SpecError(f"host {host} is reachable from outside and needs a token; name its variable with --token-env")
    listener = _listen(host, port)
    with listener:
        scorer = resolve(spec, base_dir)
        set_up(scorer, device)
        name = spec if isinstance(spec, str) else str(spec["type"])
        app = create_app(name, scorer, token=token, limits=limits)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5))
        listener.listen(128)
        address = f"[{host}]" if ":" in host else host
        announce(f"reward server of {name} listens on http://{address}:{listener.getsockname()[1]}")
        server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # Two sockets may be bound to one port with SO_REUSEADDR; only one of them may listen.
        listener.listen(1)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise PortInUse(
            f"cannot listen on {host}:{port} ({reason}); choose another --port, or 0 for a free one"
        ) from error
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _spec_of(text: str, options: list[str]) -> dict[str, Any]:
    """SPEC and ``key=value`` options as one dict; values are JSON where they parse as JSON."""
    spec: dict[str, Any] = {"type": text}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise SpecError(f"option {option!r} has no value; write key=value")
        try:
            spec[key] = json.loads(value)
        except ValueError:
            spec[key] = value
    return spec


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rewards.serve", description="Serve one reward over HTTP.")
    parser.add_argument("spec", help="geneval, path/to/file.py:reward, package.module:reward, …")
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of the scorer")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--token-env", help="variable that holds the token clients must send")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        token = os.environ.get(arguments.token_env) if arguments.token_env else None
        if arguments.token_env and not token:
            raise SpecError(f"the variable {arguments.token_env} (--token-env) is empty; set it to the token")
        spec = _spec_of(arguments.spec, arguments.options)
        serve(
            spec,
            arguments.host,
            arguments.port,
            device=arguments.device,
            token=token,
            announce=lambda line: print(line, flush=True),
        )
    except ScorerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
