"""A scorer that lives in a reward server, reached over HTTP with the standard library alone."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import time
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from rewards.interface import Images, Metadata, ScorerError, SpecError, check_inputs
from rewards.wire import CONTENT_TYPE, DEFAULT_LIMITS, TooLarge, decode_response, encode_request

_RETRIABLE = {
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
}
_CHUNK = 1 << 20
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 8.0


class ServerUnavailable(ScorerError):
    """No answer from the server after every retry."""

    kind = "unavailable"


class DeadlineExceeded(ScorerError):
    """The server did not answer in time."""

    kind = "deadline"


class ServerRefused(ScorerError):
    """The server answered with an error; ``status`` is HTTP's, ``kind`` the server's own."""

    def __init__(self, message: str, status: int, kind: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind

    def __reduce__(self) -> tuple[type[ServerRefused], tuple[str, int, str]]:
        """Exceptions cross processes by their constructor's arguments; the default keeps only the message."""
        return type(self), (str(self), self.status, self.kind)


class HttpScorer:
    """Sends batches of at most ``batch_size`` images to ``POST /score`` of a server (``rewards.serve``).

    ``deadline_s`` bounds one batch with all its retries. Only failures that a second try can cure are
    retried, ``retries`` times: no connection, a broken one, 429, 502, 503, 504. Waits double from 0.5 s
    to 8 s, each shortened at random by up to half. ``token_env`` names the variable that holds the token.
    """

    name = "url"

    def __init__(
        self,
        url: str,
        *,
        deadline_s: float = 120.0,
        retries: int = 5,
        batch_size: int = 64,
        token_env: str | None = None,
    ) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            raise SpecError(f"reward url {url!r} has a bad port; write http://host:port") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SpecError(f"reward url {url!r} is not an address; write url:http://host:port")
        if deadline_s <= 0 or retries < 0 or batch_size < 1:
            raise SpecError(f"reward url {url!r}: deadline_s must be > 0, retries >= 0 and batch_size >= 1")
        self.url = url.rstrip("/")
        self._host, self._port = parts.hostname, port
        self._secure, self._path = parts.scheme == "https", parts.path.rstrip("/")
        self.deadline_s = deadline_s
        self.retries = retries
        self.batch_size = batch_size
        self._token_env = token_env

    def setup(self, device: str | None = None) -> None:
        """Ask the server for its ``/health``; raises as ``score`` does."""
        self._ask("GET", "/health", None)

    def info(self) -> dict[str, Any]:
        """What the server says about itself."""
        return json.loads(self._ask("GET", "/info", None))

    def score(self, images: Images, prompts: list[str], metadata: list[Metadata]) -> dict[str, np.ndarray]:
        """The server's scores (N,) by reward name, NaN and Inf as they came.

        Raises ``ServerUnavailable``, ``DeadlineExceeded``, ``ServerRefused`` or ``WireError``; never
        answers for a batch that was not scored.
        """
        check_inputs(images, prompts, metadata)
        parts = []
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            body = encode_request(images[rows], prompts[rows], metadata[rows])
            if len(body) > DEFAULT_LIMITS.max_bytes:
                raise TooLarge(f"a batch of {len(body)} bytes, limit {DEFAULT_LIMITS.max_bytes}; lower batch_size")
            parts.append(decode_response(self._ask("POST", "/score", body), len(images[rows])))
        if any(part.keys() != parts[0].keys() for part in parts):
            raise ServerRefused(f"reward server {self.url} changed its reward names between batches", 200, "names")
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _ask(self, method: str, path: str, body: bytes | None) -> bytes:
        until = time.monotonic() + self.deadline_s
        for attempt in range(self.retries + 1):
            try:
                return self._once(method, path, body, until)
            except TimeoutError as error:
                raise DeadlineExceeded(
                    f"reward server {self.url} did not answer within {self.deadline_s:g} s; "
                    "check its log, raise deadline_s or lower batch_size"
                ) from error
            except (ServerRefused, OSError, http.client.HTTPException) as error:
                if isinstance(error, ServerRefused) and error.status not in _RETRIABLE:
                    raise
                wait = min(_FIRST_WAIT_S * 2**attempt, _LONGEST_WAIT_S) * random.uniform(0.5, 1)
                if attempt == self.retries or time.monotonic() + wait > until:
                    raise ServerUnavailable(
                        f"reward server {self.url} is not reachable ({type(error).__name__}: {error}) after "
                        f"{attempt + 1} tries; start it with `python -m rewards.serve` or correct the url"
                    ) from error
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _once(self, method: str, path: str, body: bytes | None, until: float) -> bytes:
        """One request on its own connection; every wait ends at ``until`` (``TimeoutError``)."""
        headers = self._headers()
        make = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = make(self._host, self._port, timeout=_left(until))
        try:
            # A server that refuses a body early may stop reading it; its answer is worth more than the broken pipe.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, self._path + path, body, headers)
            _set_timeout(connection, until)
            response = connection.getresponse()
            data = self._read(connection, response, until)
        finally:
            connection.close()
        if response.status != HTTPStatus.OK:
            raise _refusal(self.url, response.status, data)
        return data

    def _read(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse, until: float) -> bytes:
        chunks, size, limit = [], 0, DEFAULT_LIMITS.max_bytes
        while chunk := response.read1(_CHUNK):
            chunks.append(chunk)
            size += len(chunk)
            if size > limit:
                raise TooLarge(f"reward server {self.url} answered with more than {limit} bytes")
            _set_timeout(connection, until)
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
        return b"".join(chunks)

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": CONTENT_TYPE}
        if self._token_env is not None:
            token = os.environ.get(self._token_env)
            if not token:
                raise SpecError(
                    f"reward server {self.url}: the variable {self._token_env} (token_env) is empty; set it"
                )
            headers["Authorization"] = f"Bearer {token}"
        return headers


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _set_timeout(connection: http.client.HTTPConnection, until: float) -> None:
    if connection.sock is not None:
        connection.sock.settimeout(_left(until))


def _refusal(url: str, status: int, data: bytes) -> ServerRefused:
    try:
        error = json.loads(data)["error"]
        kind, message = str(error["type"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        kind, message = "http", data[:100].decode("utf-8", "replace")
    return ServerRefused(f"reward server {url} refused the batch ({status}, {kind}): {message}", status, kind)
