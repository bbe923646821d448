"""The wait that a busy server asks for with ``Retry-After`` (RFC 9110, 10.2.3): seconds, or a date."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC
from email.message import Message
from email.utils import parsedate_to_datetime
from http import HTTPStatus

_ASKING = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


def asked_wait_s(status: int, headers: Mapping[str, str] | Message) -> float:
    """Return the seconds until the server wants to be asked again.

    It is 0 where it does not say, or says it in no known form.

    A date is compared with the answer's own, where it has one: the two clocks need not agree.
    """
    text = headers.get("Retry-After", "").strip()
    if status not in _ASKING or not text:
        return 0.0
    if text.isascii() and text.isdigit():
        return float(text)
    until = _moment(text)
    if until is None:
        return 0.0
    now = _moment(headers.get("Date", ""))
    return max(0.0, until - (time.time() if now is None else now))


def _moment(text: str) -> float | None:
    try:
        found = parsedate_to_datetime(text)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
