"""HTTP with the standard library alone: one deadline over all of a request, bounded retries, failover, typed errors."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
import ssl
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from urllib.parse import urlsplit

from rewards.http.deadline import TimedSocket, connect, left
from rewards.http.replicas import Replica, Replicas
from rewards.http.retryafter import asked_wait_s
from rewards.interface import ScorerError, SpecError, one_line
from rewards.wire import DEFAULT_LIMITS, TooLarge, WireError

_RETRIABLE = {
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
}
_CHUNK = 1 << 20
_ERROR_BYTES = 1 << 16  # of a body that only says why
_KIND, _MESSAGE = 50, 500  # characters of it that are passed on
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 8.0
_CONNECT_S = 10.0
_JSON = "application/json"


class ServerUnavailable(ScorerError):
    """No answer from any server after every retry."""

    kind = "unavailable"


class DeadlineExceeded(ScorerError):
    """No server answered in time."""

    kind = "deadline"


class ServerRefused(ScorerError):
    """The server answered with an error; ``status`` is HTTP's, ``kind`` the server's own, ``wait_s`` its wish."""

    def __init__(self, message: str, status: int, kind: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.wait_s = wait_s

    def __reduce__(self) -> tuple[type[ServerRefused], tuple[str, int, str]]:
        """Return the constructor's arguments, by which exceptions cross processes.

        The default keeps only the message.
        """
        return type(self), (str(self), self.status, self.kind)


class Endpoint:
    """Addresses that give the same answers; ``what`` (such as "reward server") is what errors call one.

    ``deadline_s`` bounds one request with all its tries and all they are made of: names looked up, connections,
    headers and bodies, however slowly these come. Redirects are refused, not followed. Only failures that another try
    can cure lead to one: no connection, a broken one, 408, 429, 502, 503, 504. The next address is asked at once, and
    one that stays silent is left for the next after an equal share of the time. When all have failed they are asked
    again after a wait, ``retries`` times; waits double from 0.5 s to 8 s, each shortened at random by up to a quarter.
    An address that answered 429 or 503 with ``Retry-After`` is asked again when it says, but after half of the time
    that is left at the latest, so that another try has as long. An address that failed ``breaker_failures`` times in a
    row is left out for ``breaker_reset_s`` (``rewards.http.replicas``). ``token_env`` names the variable that holds the
    bearer token. ``hint`` is what to do where nothing answers.

    Raises:
        SpecError: an address is no http(s) address or is given twice, or a number is out of range.
    """

    def __init__(
        self,
        *urls: str,
        what: str,
        hint: str,
        deadline_s: float = 120.0,
        retries: int = 5,
        token_env: str | None = None,
        breaker_failures: int = 3,
        breaker_reset_s: float = 30.0,
    ) -> None:
        addresses = [Address(url, what=what, token_env=token_env) for url in urls]
        known = [address.url for address in addresses]
        self.addresses, self.url = known, ", ".join(known)
        if twice := next((url for url in known if known.count(url) > 1), None):
            raise SpecError(f"{what} url {twice!r} is given twice; name each address once")
        if deadline_s <= 0 or retries < 0:
            raise SpecError(f"{what} url {self.url!r}: deadline_s must be > 0 and retries >= 0")
        if breaker_failures < 1 or breaker_reset_s < 0:
            raise SpecError(f"{what} url {self.url!r}: breaker_failures must be >= 1 and breaker_reset_s >= 0")
        self.what, self.hint = what, hint
        self.deadline_s, self.retries = deadline_s, retries
        self._failed: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._replicas = Replicas(addresses, breaker_failures=breaker_failures, breaker_reset_s=breaker_reset_s)

    def ask(self, method: str, path: str, body: bytes | None = None, content_type: str = _JSON) -> bytes:
        """Return the body of the answer.

        Raises:
            ServerUnavailable, DeadlineExceeded, ServerRefused, TooLarge, or SpecError for an unusable token variable.
        """
        until = time.monotonic() + self.deadline_s
        for attempt in range(self.retries + 1):
            failure: Exception | None = None
            for replica, choices in self._replicas.round():
                now = time.monotonic()
                try:
                    answer = replica.address.send(method, path, body, content_type, now + (until - now) / choices)
                except (ServerRefused, OSError, http.client.HTTPException) as error:
                    if isinstance(error, ServerRefused) and error.status not in _RETRIABLE:
                        self._replicas.answered(replica)
                        raise
                    asked = error.wait_s if isinstance(error, ServerRefused) else 0.0
                    self._replicas.failed(replica, _cause(error), busy_s=min(asked, (until - time.monotonic()) / 2))
                    self._count(f"{replica.address.url}: {_cause(error)}")
                    failure = error
                else:
                    self._replicas.answered(replica)
                    return answer
            wait = min(_FIRST_WAIT_S * 2**attempt, _LONGEST_WAIT_S) * random.uniform(0.75, 1)
            wait = max(wait, self._replicas.busy_s())
            late = time.monotonic() + wait > until
            if late or attempt == self.retries:
                raise self._gave_up(late and isinstance(failure, TimeoutError), attempt + 1) from failure
            time.sleep(wait)
        raise AssertionError("unreachable")

    def retried(self) -> dict[str, int]:
        """Return how often a request had to be made again since the last call, by address and cause."""
        with self._counting:
            counts, self._failed = dict(self._failed), Counter()
        return counts

    def _count(self, cause: str) -> None:
        with self._counting:
            self._failed[cause] += 1

    def _gave_up(self, silent: bool, tries: int) -> ScorerError:
        """Return the error to raise when the last one asked was ``silent`` to the end, or no other try is left."""
        who, why = f"{self.what} {self.url}", ""
        if len(self.addresses) > 1:
            who, why = self.what, "; ".join(f"{r.address.url}: {r.cause or 'not asked'}" for r in self._replicas.all)
        if silent:
            return DeadlineExceeded(
                f"{who} did not answer within {self.deadline_s:g} s{why and f' ({why})'}; "
                "check its log, raise deadline_s or lower batch_size"
            )
        why = why or self._replicas.all[0].cause
        return ServerUnavailable(f"{who} is not reachable ({why}) after {tries} tries; {self.hint}")

    def unreachable(self, path: str) -> dict[str, str]:
        """Return the addresses that do not answer ``GET path`` now, and why.

        Each is asked once, all at the same time.
        """
        until = time.monotonic() + min(self.deadline_s, _CONNECT_S)

        def cause(replica: Replica[Address]) -> str:
            try:
                replica.address.send("GET", path, None, _JSON, until)
            except (ServerRefused, OSError, http.client.HTTPException) as error:
                self._replicas.failed(replica, _cause(error))
                return _cause(error)
            return ""

        with ThreadPoolExecutor(len(self._replicas.all)) as pool:
            causes = dict(zip(self._replicas.all, pool.map(cause, self._replicas.all), strict=True))
        return {replica.address.url: cause for replica, cause in causes.items() if cause}


class Address:
    """One http(s) address that is asked once, on a connection of its own."""

    def __init__(self, url: str, *, what: str, token_env: str | None) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
            (parts.hostname or "").encode("idna")
        except ValueError:
            raise SpecError(f"{what} url {url!r} has a bad port or host; write http://host:port") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SpecError(f"{what} url {url!r} is not an address; write http://host:port")
        self.url = url.rstrip("/")
        self._who = f"{what} {self.url}"
        self._host, self._port = parts.hostname, port
        self._secure, self._path = parts.scheme == "https", parts.path.rstrip("/")
        self._token_env = token_env

    def send(self, method: str, path: str, body: bytes | None, content_type: str, until: float) -> bytes:
        """Return the body of the answer.

        Raise ``TimeoutError`` at ``until``, or where no connection is made in 10 s.
        """
        headers = self._headers(content_type)
        soon = min(until, time.monotonic() + _CONNECT_S)
        context = _encryption() if self._secure else None
        if context is None:
            connection = http.client.HTTPConnection(self._host, self._port)
        else:
            connection = http.client.HTTPSConnection(self._host, self._port, context=context)
        with self._connected(connection.port, context, soon) as made:
            connection.sock = TimedSocket(made, until)  # type: ignore[assignment]
            # A server that refuses a body early may stop reading it; its answer is worth more than the broken pipe.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, self._path + path, body, headers)
            response = connection.getresponse()
            data = self._read(response)
        if response.status != HTTPStatus.OK:
            raise _refusal(self._who, response.status, data, asked_wait_s(response.status, response.headers))
        return data

    def _connected(self, port: int, context: ssl.SSLContext | None, until: float) -> socket.socket:
        plain = connect(self._host, port, until)
        if context is None:
            return plain
        try:
            plain.settimeout(left(until))
            return context.wrap_socket(plain, server_hostname=self._host)
        except BaseException:
            plain.close()
            raise

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        """Return the body; of an answer that is an error no more than its beginning."""
        chunks, size, limit = [], 0, DEFAULT_LIMITS.max_bytes
        failed = response.status != HTTPStatus.OK
        if not failed:
            self._check_length(response, limit)
        while chunk := response.read1(_ERROR_BYTES if failed else _CHUNK):
            chunks.append(chunk)
            size += len(chunk)
            if failed and size >= _ERROR_BYTES:
                return b"".join(chunks)[:_ERROR_BYTES]
            if size > limit:
                raise TooLarge(f"{self._who} answered with more than {limit} bytes")
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
        return b"".join(chunks)

    def _check_length(self, response: http.client.HTTPResponse, limit: int) -> None:
        """Raise WireError for an answer whose end two readers could see at two places."""
        said = response.headers.get_all("Content-Length", [])
        if not said:
            return
        if len(said) > 1 or "Transfer-Encoding" in response.headers:
            raise WireError(f"{self._who} said in two ways how long its answer is; look what answers there")
        digits = said[0].strip()
        if not (digits.isascii() and digits.isdigit()):
            raise WireError(f"{self._who} answered with the Content-Length {digits[:40]!r}; look what answers there")
        if len(digits.lstrip("0")) > len(str(limit)) or int(digits) > limit:
            raise TooLarge(f"{self._who} answered with more than {limit} bytes")

    def _headers(self, content_type: str) -> dict[str, str]:
        headers = {"Content-Type": content_type}
        if self._token_env is not None:
            token = os.environ.get(self._token_env, "")
            if not (token.isascii() and token.isprintable() and token):
                why = "holds characters that no HTTP header can" if token else "is empty"
                raise SpecError(f"{self._who}: the variable {self._token_env} (token_env) {why}; set it to the token")
            headers["Authorization"] = f"Bearer {token}"
        return headers


def _encryption() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _cause(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "silent"
    if isinstance(error, ServerRefused):
        return f"answered {error.status}, {error.kind}"
    return f"{type(error).__name__}: {one_line(error)}"


def _refusal(who: str, status: int, data: bytes, wait_s: float) -> ServerRefused:
    try:
        error = json.loads(data)["error"]
        kind, message = str(error.get("type") or "http"), str(error["message"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        kind, message = "http", data[:100].decode("utf-8", "replace")
    kind, message = one_line(kind, _KIND), one_line(message, _MESSAGE)
    return ServerRefused(f"{who} refused the request ({status}, {kind}): {message}", status, kind, wait_s)
