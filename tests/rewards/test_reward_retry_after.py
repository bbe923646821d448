"""A server that is busy says with Retry-After when it wants to be asked again, and is asked then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest

from rewards.http import transport
from rewards.http.client import HttpScorer
from rewards.http.retryafter import asked_wait_s
from rewards.wire import encode_response

LONG_AGO = 1_000_000_000  # by the server's clock


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    """All waits that are left are the server's."""
    monkeypatch.setattr(transport, "_FIRST_WAIT_S", 0.0)


@contextmanager
def busy(times: int, status: int, wish: str, images: int = 5) -> Iterator[tuple[str, list[float]]]:
    """A server that answers so many requests with ``status`` and further ones with scores: its address, and when each
    request came."""
    asked: list[float] = []

    class Busy(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(time.monotonic())
            body = self.rfile.read(int(self.headers["Content-Length"]))
            scores = encode_response({"brightness": np.zeros(images)}) if len(asked) > times else b"busy"
            assert body
            self.send_response(200 if len(asked) > times else status)
            if len(asked) <= times:
                self.send_header("Retry-After", wish)
            self.send_header("Content-Length", str(len(scores)))
            self.end_headers()
            self.wfile.write(scores)

        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate(LONG_AGO, usegmt=True)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "wish"), [(503, "1"), (429, formatdate(LONG_AGO + 1, usegmt=True))], ids=["seconds", "a date"]
)
def test_a_busy_server_is_asked_again_when_it_said(batch, status, wish):
    with busy(1, status, wish) as (url, asked):
        HttpScorer(url).score(*batch)
    assert len(asked) == 2 and asked[1] - asked[0] >= 1


def test_a_server_that_asks_for_an_hour_is_asked_again_while_there_is_time_for_an_answer(batch):
    began = time.monotonic()
    with busy(1, 503, "3600") as (url, asked):
        HttpScorer(url, deadline_s=4, retries=1).score(*batch)
    assert len(asked) == 2 and 1 < asked[1] - began < 4


def test_while_one_server_wants_to_be_left_alone_the_other_answers_and_nobody_waits(batch):
    with busy(9, 429, "3600", 1) as (url, asked), busy(0, 200, "", 1) as (other, answered):
        scorer = HttpScorer(url, replicas=[other], batch_size=1, retries=0)
        for _ in range(2):
            scorer.score(*batch)
    assert len(asked) == 1 and len(answered) == 10


@pytest.mark.parametrize(
    "wish",
    ["", "soon", "-5", "1.5", "1e9", "٣", "Wed, 99 Nov 2001 99:00:00 GMT", "2001-09-09", formatdate(1, usegmt=True)],
)
def test_a_wish_that_is_no_time_to_come_is_ignored(wish):
    assert asked_wait_s(503, {"Retry-After": wish, "Date": formatdate(LONG_AGO)}) == 0
    assert asked_wait_s(503, {}) == 0


def test_a_wish_is_heard_in_every_form_of_a_date_and_with_429_and_503_alone():
    later = {"Retry-After": "Sunday, 09-Sep-01 01:47:00 GMT", "Date": formatdate(LONG_AGO, usegmt=True)}
    assert asked_wait_s(429, later) == 20  # the older form of RFC 850
    assert 50 < asked_wait_s(503, {"Retry-After": formatdate(time.time() + 60, usegmt=True), "Date": "today"}) <= 60
    assert asked_wait_s(503, {"Retry-After": "9" * 5000}) == float("inf")
    assert [asked_wait_s(status, {"Retry-After": "5"}) for status in (408, 502, 504)] == [0, 0, 0]
