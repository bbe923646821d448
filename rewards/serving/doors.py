"""Admission to a reward server: connections in all and of one address, and how long each may take to ask.

A newcomer is always heard. Where there are too many connections one has to go that has not asked anything yet: of the
address that has most of these, the one that came first. So neither silence nor half a question keeps anybody out.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Protocol

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

SPARE_FILES = 64  # of those that the process may open: for the scorer and its libraries
FEWEST = 16
REST_S = 2.0  # for what is still on its way when its answer is given
LINES_A_MINUTE = 20
MIB = 2**20


@dataclass(frozen=True)
class Doors:
    """The limits of admission: connections, seconds for a request's head, and for its body, bytes of bodies held at
    once (and as many of decoded pictures), seconds that a request waits for room. ``allow_hosts`` are further names of
    the server."""

    connections: int = 1024
    head_s: float = 10.0
    body_s: float = 120.0
    held_bytes: int = 512 * MIB
    wait_s: float = 30.0
    allow_hosts: tuple[str, ...] = ()


DEFAULT_DOORS = Doors()


class Waiting(Protocol):
    """A connection that has not asked yet, or not again."""

    address: str

    def turn_away(self) -> None: ...


class Gate:
    """The connections of one server; ``give_way`` ends a request that is not being worked on and tells if it did."""

    def __init__(self, doors: Doors, give_way: Callable[[], bool]) -> None:
        self.head_s = doors.head_s
        self.limit = min(doors.connections, max(FEWEST, _free_files() - SPARE_FILES))
        self.open = 0
        self.turned_away = 0
        self._give_way = give_way
        self._waiting: dict[str, dict[Waiting, None]] = {}

    def enter(self) -> bool:
        """Count a newcomer; where there are too many another one goes, or, where all are at work, False."""
        self.open += 1
        return self.open <= self.limit or self.make_way()

    def make_way(self) -> bool:
        """End a connection that has not asked yet, or else a request that waits; False where there is neither."""
        self.turned_away += 1
        if self._waiting:
            next(iter(max(self._waiting.values(), key=len))).turn_away()
            return True
        return self._give_way()

    def leave(self) -> None:
        self.open -= 1

    def waits(self, one: Waiting) -> None:
        self._waiting.setdefault(one.address, {})[one] = None

    def asks(self, one: Waiting) -> None:
        """Note that a connection has asked and waits no longer."""
        of_address = self._waiting.get(one.address, {})
        of_address.pop(one, None)
        if not of_address:
            self._waiting.pop(one.address, None)


class Door(H11Protocol):
    """A connection that has asked, in ``heard``; it has `Gate.head_s` for each further head, from an answer on."""

    def __init__(self, *args: Any, gate: Gate, heard: bytes, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gate, self.address = gate, ""
        self._first = heard
        self._deadline: asyncio.TimerHandle | None = None
        self._reader_deadline: asyncio.TimerHandle | None = None
        self._heard = self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = network(self.client[0]) if self.client else ""
        self.data_received(self._first)
        self._first = b""

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._forget_reader()
        self.gate.leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._heard = True
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader_deadline = self.loop.call_later(self.gate.head_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_reader()

    def turn_away(self) -> None:
        """End a connection that has not asked yet, because another one came."""
        self._stop_waiting()
        if self._heard and self.conn.our_state is h11.IDLE:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "overloaded", "too many connections; send again later")
        else:
            self.transport.abort()

    def _look(self) -> None:
        """Wait for the next question, or do not, as far as this one has come."""
        asking = self.cycle is not None and not self.cycle.response_complete
        if asking:
            self._stop_waiting()
        elif self._deadline is None and not self.transport.is_closing():
            self._heard = False
            self._wait()

    def _wait(self) -> None:
        self.gate.waits(self)
        rest = self.conn.their_state is h11.SEND_BODY
        self._deadline = self.loop.call_later(min(self.gate.head_s, REST_S) if rest else self.gate.head_s, self._late)

    def _stop_waiting(self) -> None:
        self.gate.asks(self)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._stop_waiting()
        if self._heard and self.conn.our_state is h11.IDLE and not self.transport.is_closing():
            said = f"the request's head was not there within {self.gate.head_s:g} s"
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "too_slow", said)
        else:
            self.transport.abort()

    def _refuse(self, status: HTTPStatus, kind: str, message: str) -> None:
        self._refused = True
        self.transport.write(refusal(status, kind, message))
        self.transport.close()
        self.loop.call_later(REST_S, self.transport.abort)

    def _forget_reader(self) -> None:
        if self._reader_deadline is not None:
            self._reader_deadline.cancel()
            self._reader_deadline = None


def refusal(status: HTTPStatus, kind: str, message: str) -> bytes:
    """Return a whole answer, after which the connection is closed."""
    body = json.dumps({"error": {"type": kind, "message": message}}).encode()
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Retry-After: 1",
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


@lru_cache(maxsize=4096)
def network(address: str) -> str:
    """Return the network whose connections are counted together: an IPv4 address, or what one IPv6 host may own."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return str(ipaddress.ip_network((found, 64), strict=False)) if found.version == 6 else address


def _free_files() -> int:
    """Return how many files the process may still open."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most == resource.RLIM_INFINITY:
        return 2**31
    try:
        return most - len(os.listdir("/dev/fd"))
    except OSError:
        return most - SPARE_FILES


class FewLines(logging.Filter):
    """Lets ``lines`` records a minute pass, and then says how many it kept back: a log is no place to fill a disk."""

    def __init__(self, lines: int = LINES_A_MINUTE) -> None:
        super().__init__()
        self._lines, self._since, self._passed, self._kept = lines, float("-inf"), 0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.created - self._since >= 60:
            if self._kept:
                record.msg = f"{record.getMessage()} ({self._kept} further lines were left out before)"
                record.args = None
            self._since, self._passed, self._kept = record.created, 0, 0
        self._passed += 1
        self._kept += self._passed > self._lines
        return self._passed <= self._lines


@contextmanager
def few_lines(*loggers: str) -> Iterator[None]:
    """Let these loggers write few lines, whatever strangers do."""
    pairs = [(logging.getLogger(name), FewLines()) for name in loggers]
    for logger, kept in pairs:
        logger.addFilter(kept)
    try:
        yield
    finally:
        for logger, kept in pairs:
            logger.removeFilter(kept)
