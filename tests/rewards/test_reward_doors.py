"""A reward server whose doors are held: by silence, half a head, a body that does not come, and by very many."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from rewards.http.client import HttpScorer
from rewards.interface import Asked
from rewards.serving.doors import MIB
from rewards.wire import encode_request
from tests.rewards.conftest import ROOT, Batch, Server
from tests.rewards.test_reward_hostile import megabytes

TOKEN = "of-the-benchmark"
HEAD = b"POST /score HTTP/1.1\r\nHost: localhost\r\n"
SCORE = HEAD + b"Content-Length: %d\r\n\r\n"
LARGE = encode_request(Asked(np.zeros((3, 1024, 1024, 3), np.uint8), ["p"] * 3, [{}] * 3))  # 9 MiB


@pytest.fixture
def serve(start_server, user_file) -> Callable[..., Server]:
    """A server of a function of the user's file, with doors of this test's own."""

    def start(name: str = "brightness", files: int | None = None, **doors: object) -> Server:
        return start_server(f"{user_file}:{name}", doors=doors, files=files)

    return start


@contextlib.contextmanager
def connected(server: Server, *parts: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
        yield connection


def answer(connection: socket.socket) -> tuple[int, dict, http.client.HTTPMessage]:
    """Status, body and headers of the next answer; 0 where the connection is ended without one."""
    response = http.client.HTTPResponse(connection)
    try:
        response.begin()
        return response.status, json.loads(response.read()), response.headers
    except (ConnectionError, http.client.HTTPException):
        return 0, {}, http.client.HTTPMessage()


def assert_scores(server: Server, batch: Batch, **options: object) -> None:
    scores = HttpScorer(server.url, deadline_s=20, **options).score(*batch)  # type: ignore[arg-type]
    np.testing.assert_array_equal(scores["brightness"], batch[0].mean(axis=(1, 2, 3)))


def logged(server: Server) -> str:
    server.process.send_signal(signal.SIGINT)
    return server.process.communicate(timeout=20)[1]


def test_right_requests_are_answered_while_silence_half_heads_and_held_bodies_stay(serve, batch):
    """At the first try, long before a deadline ends any of the others."""
    server = serve(files=128, head_s=300, body_s=300, wait_s=300, held_bytes=64 * MIB)
    assert_scores(server, batch)
    before = megabytes(server, "VmRSS")
    began = time.monotonic()
    with contextlib.ExitStack() as held:
        for _ in range(4):
            body = held.enter_context(connected(server, SCORE % (50 * MIB)))
            threading.Thread(target=send, args=(body, bytes(40 * MIB)), daemon=True).start()
        others = [held.enter_context(connected(server)) for _ in range(60)]
        others += [held.enter_context(connected(server, HEAD)) for _ in range(120)]
        while megabytes(server, "VmRSS") - before < 30:  # a body is held
            time.sleep(0.05)
        for _ in range(5):
            assert_scores(server, batch, retries=0)
            assert_scores(server, (batch[0].repeat(60, 1).repeat(60, 2), *batch[1:]), retries=0)  # 6 MB
        assert time.monotonic() - began < 300 and sum(map(is_open, others)) > 30
        assert megabytes(server, "VmHWM") - before < 64 + 64
    assert logged(server).count("\n") == 1  # that it runs user code


def send(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(data)


def is_open(connection: socket.socket) -> bool:
    """Whether the other side has neither answered nor ended it."""
    connection.setblocking(False)
    try:
        connection.recv(1)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


@pytest.mark.slow
def test_right_requests_are_answered_while_what_was_ended_is_opened_anew(start_server, user_file, batch):
    server = start_server(
        f"{user_file}:brightness", "--token-env", "T", "--max-held-mib", "64", env={"T": TOKEN}, files=128
    )
    os.environ["T"] = TOKEN
    assert_scores(server, batch, token_env="T")
    before = megabytes(server, "VmRSS")
    command = [sys.executable, ROOT / "scripts/benchmarks/reward_server_attacks.py", "--pause", "0.2", "--attack"]
    others = subprocess.Popen(
        [*command, str(server.port), "60", "120", "4", "40", "50"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        while megabytes(server, "VmRSS") - before < 30:  # a body is held
            time.sleep(0.05)
        for _ in range(10):
            assert_scores(server, batch, token_env="T")
            assert_scores(server, (batch[0].repeat(60, 1).repeat(60, 2), batch[1], batch[2]), token_env="T")  # 6 MB
        assert megabytes(server, "VmHWM") - before < 64 + 64
    finally:
        others.terminate()
        opened = json.loads(others.communicate()[0])
    assert opened["silent"] > 60 and opened["half"] > 120 and opened["body"] >= 4
    assert logged(server).count("\n") == 1  # that it runs user code


def test_silence_is_ended_and_half_a_head_is_told_why(serve, batch):
    server = serve(head_s=0.4)
    with connected(server) as silent, connected(server, HEAD) as half, connected(server, b"GET /health") as first:
        assert silent.recv(100) == b""
        for connection in (half, first):
            status, said, headers = answer(connection)
            assert (status, said["error"]["type"], headers["Connection"]) == (408, "too_slow", "close")
            assert connection.recv(100) == b""
    with connected(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as kept:
        assert answer(kept)[:2] == (200, {"status": "ok"})
        kept.sendall(HEAD)
        assert answer(kept)[0] == 408
    assert_scores(server, batch)


def test_a_body_has_one_deadline_however_its_bytes_drip(serve, batch):
    server = serve(body_s=0.6)
    with connected(server, SCORE % 1000) as dripping, connected(server, SCORE % 1000, b"FAQ1") as held:
        for _ in range(30):
            with contextlib.suppress(OSError):
                dripping.sendall(b"x")
            time.sleep(0.05)
        for connection in (dripping, held):
            status, said, _ = answer(connection)
            assert (status, said["error"]["type"]) == (408, "too_slow")
    assert_scores(server, batch)


def test_a_body_whose_sender_was_refused_is_not_waited_for(start_server, user_file):
    server = start_server(f"{user_file}:brightness", "--token-env", "T", env={"T": "right"})
    with connected(server, SCORE % (1 << 28)) as connection:
        assert answer(connection)[0] == 401
        connection.settimeout(9)  # of a head it would be 10 s
        with contextlib.suppress(ConnectionError):
            assert connection.recv(1) == b""


def test_the_first_silent_connection_goes_where_there_are_too_many(serve, batch):
    server = serve(connections=4)
    with contextlib.ExitStack() as held:
        first, *others = [held.enter_context(connected(server)) for _ in range(4)]
        assert_scores(server, batch)
        with contextlib.suppress(ConnectionError):
            assert first.recv(1) == b""
        others[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer(others[-1])[0] == 200


def test_bodies_that_do_not_come_make_way_for_a_connection(serve, batch):
    server = serve(connections=4, head_s=60)
    with contextlib.ExitStack() as held:
        opened = [held.enter_context(connected(server, SCORE % 1000)) for _ in range(4)]
        time.sleep(1)  # until they are slow
        assert_scores(server, batch)
        status, said, headers = answer(opened[0])
        assert (status, said["error"]["type"], headers["Retry-After"]) == (503, "overloaded", "1")


def test_where_every_connection_is_at_work_a_newcomer_is_told_to_come_again(serve, batch):
    server = serve("slow", connections=2)
    with contextlib.ExitStack() as held:
        body = encode_request(Asked(*batch))
        for _ in range(2):
            held.enter_context(connected(server, SCORE % len(body), body))
        time.sleep(1)  # until they are at work
        with connected(server) as newcomer:
            status, said, headers = answer(newcomer)
    assert (status, said["error"]["type"], headers["Retry-After"]) == (503, "overloaded", "1")


def test_a_body_that_stopped_gives_its_room_to_one_that_comes(serve):
    server = serve(held_bytes=10 << 20)
    with connected(server, SCORE % len(LARGE), LARGE[:-1]) as held:
        time.sleep(1)
        with connected(server, SCORE % len(LARGE), LARGE) as right:
            assert len(right.recv(1 << 16)) > 0
        status, said, headers = answer(held)
        assert (status, said["error"]["type"], headers["Retry-After"]) == (503, "overloaded", "1")
        assert "limit 10" in said["error"]["message"]


def test_requests_beyond_the_room_wait_and_all_are_answered(serve):
    """The same requests all at once, with room for one."""
    server = serve(held_bytes=10 << 20)
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] + np.zeros((3, 1024, 1024, 3), np.uint8)
    found: list[list[float]] = []

    def ask() -> None:
        found.append(HttpScorer(server.url, retries=0).score(images, ["p"] * 3, [{}] * 3)["brightness"].tolist())

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[0.0, 1.0, 2.0]] * 6
    assert megabytes(server, "VmHWM") < megabytes(server, "VmRSS") + 6 * 9


def test_where_no_room_comes_the_client_is_told_to_come_again(serve, batch):
    server = serve("slow", held_bytes=100_000, wait_s=0.3)
    body = encode_request(Asked(*batch))
    with connected(server, SCORE % len(body), body):
        time.sleep(0.5)
        with connected(server, SCORE % len(body), body) as second:
            status, said, headers = answer(second)
    assert (status, said["error"]["type"], headers["Retry-After"]) == (503, "overloaded", "1")


def test_a_server_without_files_left_writes_little_and_comes_back(serve, batch):
    server = serve(files=30, connections=10_000)
    with contextlib.ExitStack() as held:
        for _ in range(200):
            held.enter_context(connected(server))
        time.sleep(2)
    assert_scores(server, batch)
    assert len(logged(server)) < 40_000


def test_a_stranger_cannot_fill_the_log(serve, batch):
    server = serve("broken")
    body = encode_request(Asked(*batch))
    for _ in range(60):
        for sent in (
            b"no http\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        ):
            with connected(server, sent) as connection:
                connection.recv(1)
        with connected(server, SCORE % len(body), body) as connection:
            assert answer(connection)[0] == 500
    said = logged(server)
    assert said.count("secret of line one") <= 60 and len(said) < 100_000  # 20 lines with their traces
