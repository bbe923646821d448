"""Answers of a reward server: ``/score``, ``/health``, ``/info`` and ``/metrics`` of one scorer.

Every error is JSON, ``{"error": {"type", "message"}}``, without a trace; the trace is in the log.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from http import HTTPStatus
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from rewards.interface import Asked, InputError, Offers, Scorer, ScorerError, call, declared_names, needs_of
from rewards.serving.batching import DEFAULT_BATCHING, Batching, Merger, Overloaded, Stopping
from rewards.serving.doors import DEFAULT_DOORS, Doors
from rewards.serving.form import read_form
from rewards.serving.hosts import Hosts, hosts_of
from rewards.serving.metrics import CONTENT_TYPE as METRICS_TYPE
from rewards.serving.metrics import ServerMetrics
from rewards.serving.requestlog import IMAGES, RequestLog
from rewards.serving.room import Crowded, Room, Stay, TooSlow
from rewards.wire import CONTENT_TYPE, DEFAULT_LIMITS, Limits, TooLarge, WireError, decode_request, encode_response

_log = logging.getLogger("rewards.serve")
_STATUS = {
    TooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    WireError: HTTPStatus.BAD_REQUEST,
    InputError: HTTPStatus.UNPROCESSABLE_ENTITY,
    Overloaded: HTTPStatus.SERVICE_UNAVAILABLE,
    Stopping: HTTPStatus.SERVICE_UNAVAILABLE,
    Crowded: HTTPStatus.SERVICE_UNAVAILABLE,
    TooSlow: HTTPStatus.REQUEST_TIMEOUT,
}
# A refused body may still be on its way; were the connection kept, the next request would read its rest.
_CLOSING = (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.SERVICE_UNAVAILABLE)
_LEAST_ROOM = 64 * 1024
OFFERS = Offers(
    "a reward server", instead="name it by its file under `rewards` of a run, or serve one without that need"
)


def create_app(
    name: str,
    scorer: Scorer,
    *,
    token: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    batching: Batching = DEFAULT_BATCHING,
    metrics: ServerMetrics | None = None,
    doors: Doors = DEFAULT_DOORS,
    hosts: Hosts | None = None,
    rooms: Rooms | None = None,
) -> FastAPI:
    """Create the server of one scorer that is already set up; it scores one batch at a time.

    It answers to ``hosts``, by default to loopback and ``doors.allow_hosts``. ``rooms`` are what it fills. Raises
    ``SpecError`` for a scorer with needs, none of which travel over HTTP.
    """
    OFFERS.check(name, needs_of(name, scorer))
    metrics = ServerMetrics(name) if metrics is None else metrics
    rooms = Rooms(doors) if rooms is None else rooms
    hosts = hosts_of("localhost", doors.allow_hosts) if hosts is None else hosts
    metrics.watch_held(lambda: rooms.bodies.held + rooms.pixels.held)
    merger = Merger(partial(call, name, scorer), batching=batching, observe=metrics.batch)
    metrics.watch_pending(lambda: merger.pending)

    answers = _Answers(name, scorer, token, limits, batching, metrics, doors, rooms, merger)
    app = FastAPI(
        title=f"reward server: {name}", docs_url=None, redoc_url=None, openapi_url=None, lifespan=answers.lifespan
    )
    app.post("/score")(answers.score)
    app.get("/health")(answers.health)
    app.get("/metrics")(answers.prometheus)
    app.get("/info")(answers.info)
    app.add_exception_handler(ScorerError, _scorer_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _unexpected)
    app.add_middleware(_KnownHosts, hosts=hosts)
    app.add_middleware(RequestLog)
    return app


@dataclass(frozen=True)
class _Answers:
    """The answers of a server of one scorer, a method a path."""

    name: str
    scorer: Scorer
    token: str | None
    limits: Limits
    batching: Batching
    metrics: ServerMetrics
    doors: Doors
    rooms: Rooms
    merger: Merger

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(self.merger.close)

    async def score(self, request: Request) -> Response:
        _authorize(request, self.token)
        with self.metrics.request() as seen:
            form = request.headers.get("content-type", "").startswith("multipart/form-data")
            async with AsyncExitStack() as held:
                asked = await self._asked(request, form, held)
                scores = await asyncio.wrap_future(self.merger.submit(asked))
            seen.done(scores)
            request.scope[IMAGES] = seen.images
        if form:
            return JSONResponse({"scores": {key: _listed(values) for key, values in scores.items()}})
        return Response(encode_response(scores), media_type=CONTENT_TYPE)

    async def _asked(self, request: Request, form: bool, held: AsyncExitStack) -> Asked:
        """Read what a request asks; ``held`` holds the room that it takes."""
        bodies = self.rooms.bodies
        size = _declared(request, self.limits)
        # The files of a form are copied out of it.
        stay = await held.enter_async_context(bodies.taken(max(size * (1 + form), _LEAST_ROOM)))
        async with bodies.reading(stay, self.doors.body_s):
            body = await _body(request, self.limits, stay)
        if not form:
            return await run_in_threadpool(decode_request, body, self.limits)

        async def decoding(size: int) -> None:
            await held.enter_async_context(self.rooms.pixels.taken(size))

        return await read_form(request.headers, body, self.limits, decoding)

    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def prometheus(self, request: Request) -> Response:
        _authorize(request, self.token)
        return Response(self.metrics.text(), media_type=METRICS_TYPE)

    async def info(self) -> dict[str, Any]:
        scale = getattr(self.scorer, "range", None)
        main, sometimes = declared_names(self.scorer)
        return {
            "name": self.name,
            "scorer": type(self.scorer).__name__,
            "main": main or self.name,
            "sometimes": sometimes,
            "range": None if scale is None else [None if abs(edge) == float("inf") else edge for edge in scale],
            "content_type": CONTENT_TYPE,
            "limits": asdict(self.limits),
            "batching": asdict(self.batching),
        }


class Rooms:
    """The limits of what a server's requests may hold at once: their bodies, and what pictures of forms become."""

    def __init__(self, doors: Doors) -> None:
        self.bodies = Room(doors.held_bytes, "requests", wait_s=doors.wait_s)
        self.pixels = Room(doors.held_bytes, "decoded pictures", wait_s=doors.wait_s)

    def give_way(self) -> bool:
        """End a request that waits for its body or for room; False where none does."""
        return self.bodies.give_way() or self.pixels.give_way()


class _KnownHosts:
    """Refuses what was meant for another server, or sent by a web page."""

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (said := two_lengths(scope)):
            await _error(HTTPStatus.BAD_REQUEST, WireError.kind, said, close=True)(scope, receive, send)
            return
        found = self._hosts.refusal(scope["headers"]) if scope["type"] == "http" else None
        if found is None:
            await self._app(scope, receive, send)
        else:
            await _error(found[0], found[0].name.lower(), found[1])(scope, receive, send)


def two_lengths(scope: Scope) -> str:
    """Say why two readers of a request, such as a proxy and this server, could see its end at two places.

    Otherwise say "".
    """
    names = [name.lower() for name, _ in scope["headers"]]
    if b"transfer-encoding" not in names:
        return ""
    if b"content-length" in names:
        return "the request has both Content-Length and Transfer-Encoding; send one of them"
    return "Transfer-Encoding in a request of HTTP/1.0; send Content-Length" if scope["http_version"] == "1.0" else ""


def _listed(values: NDArray[np.float64]) -> list[float | None]:
    """Return the scores as JSON has them: what is not finite is null."""
    return [float(value) if np.isfinite(value) else None for value in values]


def _declared(request: Request, limits: Limits) -> int:
    """Return the length that the body will have: its declared length, the limit where none is.

    Raise TooLarge beyond the limit.
    """
    declared = request.headers.get("content-length", "")
    if not declared.isdigit():
        return limits.max_bytes if "transfer-encoding" in request.headers else 0
    if int(declared) > limits.max_bytes:
        raise _too_large(limits)
    return int(declared)


async def _body(request: Request, limits: Limits, stay: Stay) -> bytearray:
    """Return the whole body, refused as soon as its length passes the limit."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        stay.received = len(body)
        if len(body) > limits.max_bytes:
            raise _too_large(limits)
    return body


def _too_large(limits: Limits) -> TooLarge:
    return TooLarge(f"body over the limit of {limits.max_bytes} bytes; send smaller batches")


def _authorize(request: Request, token: str | None) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
        raise HTTPException(HTTPStatus.UNAUTHORIZED, "wrong or missing token; send `Authorization: Bearer TOKEN`")


def _error(status: int, kind: str, message: str, close: bool = False) -> JSONResponse:
    headers = {"Connection": "close"} if close or status in _CLOSING else {}
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = "1"
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
