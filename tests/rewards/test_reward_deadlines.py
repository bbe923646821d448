"""The client's deadline is of the whole request: its name, its connection, its headers, its tries."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from rewards.http import transport
from rewards.http.client import DeadlineExceeded, HttpScorer, ServerUnavailable

LONGEST = 6.0  # of a request with a deadline of half a second, on a machine that has other things to do
pytestmark = pytest.mark.fault


@contextmanager
def server(behave: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port whose connections are each given to ``behave``, on a thread, until it returns or the client is gone."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                behave(connection)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def dripping(text: bytes) -> Callable[[socket.socket], None]:
    """A byte every 0.05 s, again and again from the start."""

    def drip(connection: socket.socket) -> None:
        for index in range(10_000):
            connection.sendall(text[index % len(text) :][:1])
            time.sleep(0.05)

    return drip


def interim(connection: socket.socket) -> None:
    """One interim answer after the other."""
    while True:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.05)


def drinking(connection: socket.socket) -> None:
    """Takes a body in sips."""
    while connection.recv(1000):
        time.sleep(0.05)


@pytest.mark.parametrize(
    "behave",
    [
        dripping(b"HTTP/1.1 200 OK and so on and on"),
        dripping(b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(99))),
        dripping(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 1000),
        dripping(b"HTTP/1.1 503 Busy\r\nContent-Length: 10000\r\n\r\n"),
        interim,
        drinking,
    ],
    ids=["a status line", "headers", "chunks", "a refusal", "interim answers", "a body taken in sips"],
)
def test_a_server_that_does_anything_slowly_hits_the_deadline(batch, behave):
    images, prompts, metadata = batch
    began = time.monotonic()
    with server(behave) as port, pytest.raises(DeadlineExceeded, match=r"within 0\.5 s"):
        if behave is drinking:
            images = images.repeat(100, 1).repeat(100, 2)  # more than a system takes by itself
        HttpScorer(f"http://127.0.0.1:{port}", deadline_s=0.5).score(images, prompts, metadata)
    assert time.monotonic() - began < LONGEST


def test_a_handshake_that_drips_hits_the_deadline(batch):
    began = time.monotonic()
    with server(dripping(b"\x16\x03\x03\x40\x00" + bytes(10_000))) as port:
        with pytest.raises((DeadlineExceeded, ServerUnavailable)):
            HttpScorer(f"https://127.0.0.1:{port}", deadline_s=0.5).score(*batch)
    assert time.monotonic() - began < LONGEST


def test_a_name_that_nobody_answers_for_hits_the_deadline(batch, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(60))
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        HttpScorer("http://rewards.internal", deadline_s=0.5).score(*batch)
    assert time.monotonic() - began < LONGEST


def test_tries_and_addresses_share_one_deadline(batch, monkeypatch):
    monkeypatch.setattr(transport, "_FIRST_WAIT_S", 0.05)
    began = time.monotonic()
    slow = dripping(b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy")
    with server(slow) as one, server(slow) as other, pytest.raises((DeadlineExceeded, ServerUnavailable)):
        HttpScorer(f"http://127.0.0.1:{one},http://127.0.0.1:{other}", deadline_s=1, retries=1000).score(*batch)
    assert time.monotonic() - began < LONGEST


def test_a_redirect_is_not_followed(batch):
    asked: list[bytes] = []

    def elsewhere(connection: socket.socket) -> None:
        asked.append(connection.recv(1 << 20))
        connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /score\r\nContent-Length: 0\r\n\r\n")

    with server(elsewhere) as port, pytest.raises(transport.ServerRefused, match="302"):
        HttpScorer(f"http://127.0.0.1:{port}").score(*batch)
    assert len(asked) == 1
