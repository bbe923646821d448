"""Servers that die, hang, drip or answer nonsense."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time

import numpy as np
import pytest

from rewards.http import transport as client_module
from rewards.http.client import DeadlineExceeded, HttpScorer, ServerRefused, ServerUnavailable
from rewards.wire import TooLarge, WireError, encode_response


@pytest.fixture
def short_waits(monkeypatch):
    monkeypatch.setattr(client_module, "_FIRST_WAIT_S", 0.05)


@pytest.mark.fault
@pytest.mark.usefixtures("short_waits")
def test_no_server_is_a_typed_error_that_says_how_to_start_one(batch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ServerUnavailable, match=r"after 3 tries; start it with `python -m rewards.serve`"):
            HttpScorer(url, retries=2).score(*batch)


@pytest.mark.fault
@pytest.mark.usefixtures("short_waits")
def test_a_server_that_dies_in_mid_batch_is_a_typed_error(serve_reward, batch):
    with pytest.raises(ServerUnavailable, match="not reachable"):
        HttpScorer(serve_reward("deadly").url, retries=2).score(*batch)


@pytest.mark.fault
def test_a_server_killed_while_it_scores_and_started_again_is_found_by_a_retry(serve_reward, batch):
    slow = serve_reward("slow")
    answers: list = []
    asking = threading.Thread(target=lambda: answers.append(HttpScorer(slow.url, deadline_s=30).score(*batch)))
    asking.start()
    time.sleep(0.5)
    os.kill(slow.process.pid, signal.SIGKILL)
    slow.process.wait()
    serve_reward("brightness", port=slow.port)
    asking.join()
    np.testing.assert_array_equal(answers[0]["brightness"], batch[0].mean(axis=(1, 2, 3)))


@pytest.mark.fault
def test_a_server_that_never_answers_hits_the_deadline(serve_reward, batch):
    server = serve_reward("slow")
    with pytest.raises(DeadlineExceeded, match=r"within 0\.5 s"):
        HttpScorer(server.url, deadline_s=0.5).score(*batch)


@pytest.mark.fault
def test_an_answer_that_drips_in_hits_the_deadline_too(batch):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 20)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(100):
                    try:
                        connection.sendall(b"x")
                    except OSError:
                        return
                    time.sleep(0.1)

        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(DeadlineExceeded):
            HttpScorer(f"http://127.0.0.1:{listener.getsockname()[1]}", deadline_s=0.6).score(*batch)
        thread.join()


@pytest.mark.fault
@pytest.mark.usefixtures("short_waits")
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>", WireError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\nFAS1", ServerUnavailable),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy", ServerUnavailable),
        (b"HTTP/1.1 400 Bad\r\nContent-Length: 2\r\n\r\nno", ServerRefused),
        (b"not http at all\r\n\r\n", ServerUnavailable),
        (b"HTTP/1.1 500 Deep\r\nContent-Length: 30000\r\n\r\n" + b"[" * 30000, ServerRefused),
        (b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 6000 + b"\r\n\r\nFAS1", TooLarge),
    ],
)
def test_a_foreign_or_truncated_answer_is_a_typed_error(batch, answer, error):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reply() -> None:
            for _ in range(2 if error is ServerUnavailable else 1):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1 << 20)
                    connection.sendall(answer)

        thread = threading.Thread(target=reply)
        thread.start()
        with pytest.raises(error):
            HttpScorer(f"http://127.0.0.1:{listener.getsockname()[1]}", retries=1).score(*batch)
        thread.join()


@pytest.mark.fault
@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: -5",
        b"Content-Length: \xb2",
        b"Content-Length: %d, %d",
        b"Content-Length: %d\r\nContent-Length: %d",
        b"Content-Length: %d\r\nTransfer-Encoding: chunked",
    ],
)
def test_right_scores_whose_length_is_not_said_or_in_two_ways_are_refused(batch, head):
    body = encode_response({"a": np.zeros(len(batch[0]))})
    said = head.replace(b"%d", str(len(body)).encode())
    sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if b"chunked" in head else body
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reply() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 20)
                connection.sendall(b"HTTP/1.1 200 OK\r\n" + said + b"\r\n\r\n" + sent)

        thread = threading.Thread(target=reply)
        thread.start()
        with pytest.raises(WireError, match=r"Content-Length|two ways"):
            HttpScorer(f"http://127.0.0.1:{listener.getsockname()[1]}", retries=0).score(*batch)
        thread.join()


@pytest.mark.fault
def test_of_an_error_s_text_and_body_only_the_beginning_is_taken(batch):
    error = {"type": "t" * 5_000, "message": "\n".join("m" * 20_000)}
    whole = json.dumps({"error": error}).encode()
    sent = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reply() -> None:
            for body, length in ((whole, len(whole)), (b"x" * (1 << 20), 1 << 40)):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1 << 20)
                    connection.sendall(b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n" % length)
                    with contextlib.suppress(OSError):
                        for _ in range(1000):
                            connection.sendall(body)
                            sent.append(len(body))
                            if body is whole:
                                break

        thread = threading.Thread(target=reply)
        thread.start()
        for kind in ("t" * 49 + "…", "http"):
            with pytest.raises(ServerRefused) as caught:
                HttpScorer(f"http://127.0.0.1:{listener.getsockname()[1]}", retries=0).score(*batch)
            assert caught.value.kind == kind and len(str(caught.value)) < 700
        thread.join()
    assert sum(sent) < 100 << 20
