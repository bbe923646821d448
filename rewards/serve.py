"""A reward server: ``python -m rewards.serve SPEC --port 8000`` runs one scorer behind HTTP.

``POST /score`` takes and returns the bytes of ``rewards.wire``, or takes a multipart form (``images``: PNG or JPEG
files, ``prompts`` and optionally ``metadata``: JSON lists) and returns JSON. ``GET /health`` and ``GET /info`` answer
JSON, ``GET /metrics`` in Prometheus' format. Every error is JSON, ``{"error": {"type", "message"}}``, without a trace;
the trace is in the log. Requests that come together are scored together (``rewards.batching``).
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import ipaddress
import json
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from rewards.batching import DEFAULT_BATCHING, Batching, Merger, Overloaded, Stopping
from rewards.form import read_form
from rewards.interface import InputError, Scorer, ScorerError, SpecError, call, set_up
from rewards.metrics import CONTENT_TYPE as METRICS_TYPE
from rewards.metrics import ServerMetrics
from rewards.printable import printable, write_out_logs
from rewards.resolve import resolve
from rewards.wire import CONTENT_TYPE, DEFAULT_LIMITS, Limits, TooLarge, WireError, decode_request, encode_response

_log = logging.getLogger("rewards.serve")
_STATUS = {
    TooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    WireError: HTTPStatus.BAD_REQUEST,
    InputError: HTTPStatus.UNPROCESSABLE_ENTITY,
    Overloaded: HTTPStatus.SERVICE_UNAVAILABLE,
    Stopping: HTTPStatus.SERVICE_UNAVAILABLE,
}


class PortInUse(ScorerError):
    """Nothing can listen there."""

    kind = "port_in_use"


def create_app(
    name: str,
    scorer: Scorer,
    *,
    token: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    batching: Batching = DEFAULT_BATCHING,
    metrics: ServerMetrics | None = None,
) -> FastAPI:
    """The server of one scorer that is already set up; it scores one batch at a time."""
    metrics = ServerMetrics(name) if metrics is None else metrics
    merger = Merger(partial(call, name, scorer), batching=batching, observe=metrics.batch)
    metrics.watch_pending(lambda: merger.pending)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(merger.close)

    app = FastAPI(title=f"reward server: {name}", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    @app.post("/score")
    async def post_score(request: Request) -> Response:
        _authorize(request, token)
        with metrics.request() as seen:
            form = request.headers.get("content-type", "").startswith("multipart/form-data")
            body = await _body(request, limits)
            if form:
                batch = await read_form(request.headers, body, limits)
            else:
                batch = await run_in_threadpool(decode_request, body, limits)
            scores = await asyncio.wrap_future(merger.submit(*batch))
            seen.done(scores)
        if form:
            return JSONResponse({"scores": {key: _listed(values) for key, values in scores.items()}})
        return Response(encode_response(scores), media_type=CONTENT_TYPE)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def prometheus(request: Request) -> Response:
        _authorize(request, token)
        return Response(metrics.text(), media_type=METRICS_TYPE)

    @app.get("/info")
    async def info() -> dict[str, Any]:
        scale = getattr(scorer, "range", None)
        return {
            "name": name,
            "scorer": type(scorer).__name__,
            "range": None if scale is None else [None if abs(edge) == float("inf") else edge for edge in scale],
            "content_type": CONTENT_TYPE,
            "limits": asdict(limits),
            "batching": asdict(batching),
        }

    app.add_exception_handler(ScorerError, _scorer_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _unexpected)
    return app


def _listed(values: NDArray[np.float64]) -> list[float | None]:
    """Scores as JSON has them: what is not finite is null."""
    return [float(value) if np.isfinite(value) else None for value in values]


async def _body(request: Request, limits: Limits) -> bytearray:
    """The whole body, refused as soon as its declared or received length passes the limit."""
    too_large = TooLarge(f"body over the limit of {limits.max_bytes} bytes; send smaller batches")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limits.max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limits.max_bytes:
            raise too_large
    return body


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


def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=HTTPStatus.BAD_REQUEST)  # nobody reads it


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
    batching: Batching = DEFAULT_BATCHING,
    announce: Callable[[str], None] = print,
) -> None:
    """Serve one scorer until interrupted; port 0 takes a free one. ``announce`` gets the address once it listens.

    At the end ``announce`` gets the totals. The logger ``rewards.requests`` has a line a request, at INFO.

    Raises ``SpecError`` for a spec that does not resolve or an address beyond this machine without a
    token, ``PortInUse`` for a port that is taken.
    """
    if token is None and not _is_loopback(host):
        raise SpecError(f"host {host} is reachable from outside and needs a token; name its variable with --token-env")
    listener = _listen(host, port)
    with listener:
        scorer = resolve(spec, base_dir)
        set_up(scorer, device)
        name = public_name(spec if isinstance(spec, str) else str(spec["type"]))
        metrics = ServerMetrics(name)
        app = create_app(name, scorer, token=token, limits=limits, batching=batching, metrics=metrics)
        listener.listen(128)
        address = f"[{host}]" if ":" in host else host
        line = f"reward server of {name} listens on http://{address}:{listener.getsockname()[1]}"
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
        began = time.monotonic()
        try:
            _Server(config, lambda: announce(line)).run(sockets=[listener])
        finally:
            announce(f"reward server of {name} ends after {time.monotonic() - began:.0f} s: {metrics.totals()}")


def public_name(spec: str) -> str:
    """What strangers may read of a spec: of ``/a/path/file.py:reward`` the file and what it names."""
    location, colon, attribute = spec.rpartition(":")
    return f"{Path(location).name}:{attribute}" if colon and location.endswith(".py") else spec


class _Server(uvicorn.Server):
    """Says that it listens once it can also be interrupted, not before."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()


def log_requests(wanted: bool) -> None:
    """A line for each request on standard error, or none."""
    log = logging.getLogger("rewards.requests")
    log.setLevel(logging.INFO if wanted else logging.WARNING)
    if wanted and not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        log.propagate = False


def _listen(host: str, port: int) -> socket.socket:
    # asyncio turns Nagle's delay off only where the protocol is named; a kept connection would wait 40 ms an answer.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
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
    parser.add_argument("--max-batch-images", type=int, default=64, help="images of merged requests; 1 merges none")
    parser.add_argument("--max-wait-ms", type=float, default=5.0, help="how long a request waits for others")
    parser.add_argument("--log-requests", action="store_true", help="a line for each request on standard error")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    write_out_logs()
    log_requests(arguments.log_requests)
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
            batching=Batching(max_images=arguments.max_batch_images, max_wait_s=arguments.max_wait_ms / 1000),
            announce=lambda line: print(printable(line), flush=True),
        )
    except ScorerError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
