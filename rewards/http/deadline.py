"""A connection that ends at a moment, whatever the other side sends until then.

A socket's own timeout begins anew with every byte, so that a server that sends one now and then is waited for without
end. Moments are those of ``time.monotonic``.
"""

from __future__ import annotations

import io
import queue
import socket
import threading
import time
from typing import Any


def left(until: float) -> float:
    """Return the seconds until then. Raise TimeoutError where there are none."""
    seconds = until - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("timed out")
    return seconds


def connect(host: str, port: int, until: float) -> socket.socket:
    """Return a connection to the first address of ``host`` that takes one.

    Raises:
        OSError: no address took it; TimeoutError (one of them) where the name or the addresses stay silent.
    """
    failure: OSError | None = None
    for family, kind, protocol, _, address in _addresses(host, port, until):
        made = socket.socket(family, kind, protocol)
        try:
            made.settimeout(left(until))
            made.connect(address)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return made
        except OSError as error:
            made.close()
            failure = error
    raise failure or OSError(f"{host} has no address")


def _addresses(host: str, port: int, until: float) -> list[Any]:
    """Call ``getaddrinfo`` beside us, and leave it there if need be.

    It takes no deadline and may wait for name servers.
    """
    answers: queue.SimpleQueue[list[Any] | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            answers.put(error)

    threading.Thread(target=ask, name="reward-names", daemon=True).start()
    try:
        found = answers.get(timeout=left(until))
    except queue.Empty:
        raise TimeoutError(f"the name {host} was not found in time") from None
    if isinstance(found, OSError):
        raise found
    return found


class TimedSocket:
    """A socket for ``http.client``, each wait no longer than ``until``.

    Who made the socket closes it: ``http.client`` does so while it still reads.
    """

    def __init__(self, plain: socket.socket, until: float) -> None:
        self._plain, self._until = plain, until

    def sendall(self, data: Any) -> None:
        self._plain.settimeout(left(self._until))
        self._plain.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self._plain, self._until))

    def close(self) -> None:
        pass


class _Reader(io.RawIOBase):
    def __init__(self, plain: socket.socket, until: float) -> None:
        self._plain, self._until = plain, until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._plain.settimeout(left(self._until))
        return self._plain.recv_into(buffer)
