"""A porch where newcomers to a reward server wait, as bare sockets, until they have asked something.

A connection costs a server thirty times more once it has a protocol. Those that send nothing, or half a head, never get
one, so that very many of them may come and go beside those that ask.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus

from rewards.serving.doors import Gate, network, refusal

LONGEST_HEAD = 16 * 1024  # as much as h11 takes
BURST = 64  # newcomers in one turn of the event loop
SWEEP_S = 0.25
REST_S = 0.2  # without files to open, before the next newcomer is looked for
_PIECE = 64 * 1024
_log = logging.getLogger("rewards.serve")


class Newcomer:
    """A connection whose first head is not there yet."""

    def __init__(self, porch: Porch, link: socket.socket, address: str) -> None:
        self.porch, self.link, self.address = porch, link, address
        self.until = time.monotonic() + porch.gate.head_s
        self.heard = bytearray()

    def turn_away(self) -> None:
        """End it, because another one came."""
        self.end(HTTPStatus.SERVICE_UNAVAILABLE, "overloaded", "too many connections; send again later")

    def end(self, status: HTTPStatus, kind: str, message: str) -> None:
        """Close it; one that has begun to ask is told why."""
        if self.heard:
            try:
                self.link.send(refusal(status, kind, message))
            except OSError:
                pass  # it is gone, or reads nothing
        self.porch.forget(self)
        self.porch.gate.leave()
        self.link.close()


class Porch:
    """Takes the connections of a listening socket and hands each over, with what it said, once its head is there.

    ``hand_over`` makes a protocol of what was read so far. Uses the running event loop.
    """

    def __init__(self, listener: socket.socket, gate: Gate, hand_over: Callable[[bytes], asyncio.Protocol]) -> None:
        self.gate = gate
        self._listener, self._hand_over = listener, hand_over
        self._loop = asyncio.get_running_loop()
        self._here: dict[Newcomer, None] = {}
        self._tasks: set[asyncio.Task[object]] = set()
        listener.setblocking(False)
        self._loop.add_reader(listener, self._come)
        self._timer = self._loop.call_later(SWEEP_S, self._sweep)

    def close(self) -> None:
        """Take nobody more and end those that have not asked yet."""
        self._timer.cancel()
        self._loop.remove_reader(self._listener)
        for newcomer in list(self._here):
            newcomer.end(HTTPStatus.SERVICE_UNAVAILABLE, "stopping", "the reward server is stopping")

    def forget(self, newcomer: Newcomer) -> None:
        """Note that a newcomer waits here no longer."""
        self._loop.remove_reader(newcomer.link)
        self._here.pop(newcomer, None)
        self.gate.asks(newcomer)

    def _come(self) -> None:
        for _ in range(BURST):
            try:
                link, peer = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no file is left; those in the queue are kept there by the system
                _log.error("no connection can be taken: %s", error.strerror)
                self.gate.make_way()
                self._loop.remove_reader(self._listener)
                self._loop.call_later(REST_S, self._again)
                return
            link.setblocking(False)
            newcomer = Newcomer(self, link, network(peer[0]))
            if not self.gate.enter():
                newcomer.heard += b"?"
                newcomer.end(
                    HTTPStatus.SERVICE_UNAVAILABLE, "overloaded", "too many requests are open; send again later"
                )
                continue
            self._here[newcomer] = None
            self.gate.waits(newcomer)
            self._loop.add_reader(link, self._hear, newcomer)

    def _again(self) -> None:
        if not self._timer.cancelled():
            self._loop.add_reader(self._listener, self._come)

    def _hear(self, newcomer: Newcomer) -> None:
        try:
            data = newcomer.link.recv(_PIECE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        newcomer.heard += data
        if not data:
            newcomer.heard.clear()
            newcomer.turn_away()
        elif b"\n\r\n" in newcomer.heard or b"\n\n" in newcomer.heard or len(newcomer.heard) > LONGEST_HEAD:
            self.forget(newcomer)
            made = self._loop.connect_accepted_socket(lambda: self._hand_over(bytes(newcomer.heard)), newcomer.link)
            task = self._loop.create_task(made)
            self._tasks.add(task)
            task.add_done_callback(partial(self._handed_over, newcomer))

    def _handed_over(self, newcomer: Newcomer, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is not None:
            self.gate.leave()
            newcomer.link.close()

    def _sweep(self) -> None:
        now = time.monotonic()
        for newcomer in list(self._here):  # the first came first
            if newcomer.until > now:
                break
            said = f"the request's head was not there within {self.gate.head_s:g} s"
            newcomer.end(HTTPStatus.REQUEST_TIMEOUT, "too_slow", said)
        self._timer = self._loop.call_later(SWEEP_S, self._sweep)
