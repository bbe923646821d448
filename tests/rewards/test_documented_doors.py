"""docs/safety.md and docs/rewards.md say the limits that the reward server has, and what is beyond them."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import uvicorn
from starlette.exceptions import HTTPException
from starlette.requests import Request

from rewards.serving import app, room
from rewards.serving.app import _STATUS
from rewards.serving.doors import DEFAULT_DOORS, LINES_A_MINUTE, MIB, SPARE_FILES
from rewards.serving.hosts import hosts_of
from rewards.wire import DEFAULT_LIMITS, TooLarge
from tests.rewards.conftest import Server

DOCS = Path(__file__).parents[2] / "docs"
KEPT_S = uvicorn.Config(app.create_app).timeout_keep_alive
ORIGIN = [(b"host", b"localhost"), (b"origin", b"http://evil.example")]


def status_of_a_wrong_token() -> int:
    with pytest.raises(HTTPException) as refused:
        app._authorize(Request({"type": "http", "headers": []}), "right")
    return refused.value.status_code


def refused(headers: list[tuple[bytes, bytes]]) -> int:
    found = hosts_of("localhost").refusal(headers)
    assert found is not None
    return int(found[0])


def answer_to_no_http(server: Server) -> tuple[str, int]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"no http\r\n\r\n")
        response = http.client.HTTPResponse(connection)
        response.begin()
        return response.headers.get_content_type(), response.status


def test_the_table_of_doors_is_what_the_server_does_where_nothing_is_asked_for(
    shared_server: Callable[[str], Server],
) -> None:
    text = (DOCS / "safety.md").read_text(encoding="utf-8").partition("**The doors of a reward server.**")[2]
    rows = [row.strip("| ").split(" | ") for row in text.partition("\n\n|")[2].partition("\n\n")[0].splitlines()[2:]]
    late, busy = int(_STATUS[room.TooSlow]), int(_STATUS[room.Crowded])
    kind, unread = answer_to_no_http(shared_server("brightness"))
    assert kind == "text/plain"
    assert {row[0]: row[1:] for row in rows} == {
        "the head of a request": [f"{DEFAULT_DOORS.head_s:g} s", f"{late}"],
        "its body": [f"{DEFAULT_DOORS.body_s:g} s", f"{late}"],
        f"a body slower than {room.PACE // 1024} KiB/s": ["stays while nobody else needs its room", f"{busy}"],
        "a kept connection that is silent": [f"{KEPT_S} s", "closed"],
        "one body": [f"{DEFAULT_LIMITS.max_bytes // MIB} MiB", f"{_STATUS[TooLarge]:d}"],
        "bodies held at once": [
            f"{DEFAULT_DOORS.held_bytes // MIB} MiB, and as much of decoded pictures",
            f"wait unread for {DEFAULT_DOORS.wait_s:g} s, then {busy}",
        ],
        "connections": [
            f"{DEFAULT_DOORS.connections:,}, and {SPARE_FILES} fewer than files may be opened",
            f"the oldest that has asked nothing is closed; with half a head, or where all are at work, {busy}",
        ],
        "lines in the log by strangers": [f"{LINES_A_MINUTE} a minute", "left out and counted"],
        "what is not HTTP": ["refused, as plain text", f"{unread}"],
        "a `Host` that is not the server's": ["refused", f"{refused([(b'host', b'evil.example')])}"],
        "a web page of another address": ["refused", f"{refused(ORIGIN)}"],
        "no token, or a wrong one, where there is one": ["refused", f"{status_of_a_wrong_token()}"],
    }


def test_the_page_of_rewards_says_the_same_limits() -> None:
    text = " ".join((DOCS / "rewards.md").read_text(encoding="utf-8").split())
    late, busy = int(_STATUS[room.TooSlow]), int(_STATUS[room.Crowded])
    limits, doors = DEFAULT_LIMITS, DEFAULT_DOORS
    for said in (
        f"A request's head has {doors.head_s:g} s, its body {doors.body_s:g} s ({late} after that).",
        f"A kept connection is closed after {KEPT_S} s of silence.",
        f"Up to {doors.held_bytes // MIB} MiB of requests are held at once",
        f"More wait for {doors.wait_s:g} s at most, unread, and then get {busy}",
        f"A body that comes slower than {room.PACE // 1024} KiB/s",
        f"There are {doors.connections:,} at most, and {SPARE_FILES} fewer than the process may open files",
        f"{limits.max_bytes // MIB} MiB a request, {limits.max_count:,} images, 4096 × 4096 pixels each, ",
        f"{limits.min_side} pixels a side at least; {limits.max_decoded_pixels // 10**6} million pixels in all",
    ):
        assert said in text, said
    assert limits.max_pixels == 4096 * 4096
