"""A scorer that lives in a reward server, reached over HTTP with the standard library alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from rewards.http.transport import DeadlineExceeded as DeadlineExceeded
from rewards.http.transport import Endpoint, ServerRefused
from rewards.http.transport import ServerUnavailable as ServerUnavailable
from rewards.interface import Answers, Asked, SpecError, check_inputs
from rewards.wire import CONTENT_TYPE, DEFAULT_LIMITS, TooLarge, WireError, decode_response, encode_request

_log = logging.getLogger("rewards")


class HttpScorer(Answers):
    """Sends batches of at most ``batch_size`` images to ``POST /score`` of a server (``rewards.serve``).

    ``url`` is its address, or several separated by commas; ``replicas`` are further addresses of the same reward.
    Batches go to them in turn, and to the next one where one fails. The other options are those of
    ``rewards.http.transport.Endpoint``, a batch being a request.
    """

    name = "url"
    sometimes: tuple[str, ...] = ()

    def __init__(
        self,
        url: str,
        *,
        replicas: str | Sequence[str] = (),
        deadline_s: float = 120.0,
        retries: int = 5,
        batch_size: int = 64,
        token_env: str | None = None,
        breaker_failures: int = 3,
        breaker_reset_s: float = 30.0,
    ) -> None:
        if batch_size < 1:
            raise SpecError(f"reward url {url!r}: batch_size must be >= 1")
        given = [url, replicas] if isinstance(replicas, str) else [url, *replicas]
        self.endpoint = Endpoint(
            *(address.strip() for text in given for address in str(text).split(",")),
            what="reward server",
            hint="start it with `python -m rewards.serve` or correct the url",
            deadline_s=deadline_s,
            retries=retries,
            token_env=token_env,
            breaker_failures=breaker_failures,
            breaker_reset_s=breaker_reset_s,
        )
        self.url = self.endpoint.url
        self.batch_size = batch_size
        self._names: set[str] = set()

    def setup(self, device: str | None = None) -> None:
        """Ask for ``/health``: raises as ``answer`` does where no address answers, warns of each that does not.

        Take from ``/info``, where it says so, which score is the main one and which ones need not apply to every image.
        """
        self.endpoint.ask("GET", "/health")
        with suppress(ServerRefused, WireError):  # a server of another make need not have it
            said = self.info()
            main, sometimes = said.get("main"), said.get("sometimes")
            self.name = main if isinstance(main, str) and main else self.name
            self.sometimes = tuple(map(str, sometimes)) if isinstance(sometimes, list) else ()
        down = self.endpoint.unreachable("/health") if len(self.endpoint.addresses) > 1 else {}
        for address, cause in down.items():
            _log.warning("reward server %s is not reachable (%s); the other addresses take its batches", address, cause)
        self.endpoint.retried()  # what happened before the first batch is none of its retries

    def retried(self) -> dict[str, int]:
        """Return how often a batch had to be sent again since the last call, by address and cause."""
        return self.endpoint.retried()

    def info(self) -> dict[str, Any]:
        """Return the server's facts about itself. Raise ``WireError`` where that is no JSON object."""
        try:
            found = json.loads(self.endpoint.ask("GET", "/info"))
        except (ValueError, RecursionError) as error:
            raise WireError(f"reward server {self.url}: /info is not JSON ({type(error).__name__})") from error
        if not isinstance(found, dict):
            raise WireError(f"reward server {self.url}: /info is a JSON {type(found).__name__}, not an object")
        return found

    def answer(self, asked: Asked) -> dict[str, np.ndarray]:
        """Return the server's scores (N,) by reward name, NaN and Inf as they came.

        Raises ``ServerUnavailable``, ``DeadlineExceeded``, ``ServerRefused`` or ``WireError``; never
        answers for a batch that was not scored.
        """
        check_inputs(asked)
        parts = []
        for start in range(0, len(asked), self.batch_size):
            some = asked.take(slice(start, start + self.batch_size))
            body = encode_request(some)
            if len(body) > DEFAULT_LIMITS.max_bytes:
                raise TooLarge(f"a batch of {len(body)} bytes, limit {DEFAULT_LIMITS.max_bytes}; lower batch_size")
            part = decode_response(self.endpoint.ask("POST", "/score", body, CONTENT_TYPE), len(some))
            self._check_names(set(part))
            parts.append(part)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _check_names(self, names: set[str]) -> None:
        """Check the names.

        Scores of one reward must never be mixed with those of another that answers at a replica's address.
        """
        self._names = self._names or names
        if names != self._names:
            raise ServerRefused(
                f"reward server {self.url} answered with {', '.join(sorted(names))}, before with "
                f"{', '.join(sorted(self._names))}; serve one and the same reward at every address",
                200,
                "names",
            )
