"""Requests that mean harm: each gets a typed 4xx at once, costs little memory, and the server scores rightly after."""

from __future__ import annotations

import http.client
import io
import json
import pickle
import struct
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rewards.http.client import HttpScorer
from rewards.interface import Asked, ScorerError
from rewards.serving.pictures import decode, look_at
from rewards.wire import DEFAULT_LIMITS, encode_request
from tests.rewards._files import jpeg_without_blocks, png_of, rows
from tests.rewards.conftest import Server

TOKEN = {"Authorization": "Bearer right"}
EDGE = "edge-of-a-part"
RGB = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
MAX_MEGABYTES = 100  # of which bodies have 17 and their copies as much


def picture(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


Sent = tuple[bytes, dict[str, str]]


def binary(shape: list[int], prompts: Any, payload: bytes = b"", **changes: Any) -> Sent:
    """A request of ``rewards.wire`` with any header; ``metadata`` fits the prompts unless it is given."""
    header = {"shape": shape, "prompts": prompts, "metadata": [{}] * len(prompts), **changes}
    return framed(json.dumps(header).encode(), payload)


def framed(header: bytes, payload: bytes = b"") -> Sent:
    return struct.pack("<4sI", b"FAQ1", len(header)) + header + payload, {}


def form(*files: bytes, prompts: bytes | list[bytes] = b"p") -> Sent:
    """A multipart form of image files and prompts."""
    texts = prompts if isinstance(prompts, list) else [prompts]
    named = [(b'name="prompts"', text) for text in texts] + [(b'name="images"; filename="x"', data) for data in files]
    parts = [
        f"--{EDGE}\r\nContent-Disposition: form-data; ".encode() + name + b"\r\n\r\n" + data + b"\r\n"
        for name, data in named
    ]
    return b"".join(parts) + f"--{EDGE}--\r\n".encode(), {"Content-Type": f"multipart/form-data; boundary={EDGE}"}


GOOD = encode_request(Asked(RGB[None], ["p"], [{}]))
MANY_LISTS = b"[" + b"[]," * (DEFAULT_LIMITS.max_header_bytes // 3 - 1) + b"0]"
TEN_THOUSAND = ["p"] * 10_000
UNUSABLE = (400, "malformed")
TOO_LARGE = (413, "too_large")
NOT_JUDGED = (422, "bad_input")
UNKNOWN = (401, "unauthorized")
HOSTILE: dict[str, tuple[Callable[[], Sent], tuple[int, str]]] = {
    "no body": (lambda: (b"", {}), UNUSABLE),
    "a pickle": (lambda: (pickle.dumps({"images": RGB}), {}), UNUSABLE),
    "a pickle of 16 megabytes": (lambda: (pickle.dumps(bytes(16 << 20)), {}), UNUSABLE),
    "a pickle that calls itself a form": (
        lambda: (pickle.dumps([RGB]), {"Content-Type": "multipart/form-data"}),
        UNUSABLE,
    ),
    "2 gigabytes declared": (lambda: (GOOD, {"Content-Length": str(2 << 30)}), TOO_LARGE),
    "2 gigabytes declared of a form": (
        lambda: (form(picture(RGB))[0], {**form()[1], "Content-Length": str(2 << 30)}),
        TOO_LARGE,
    ),
    "a header of 4 gigabytes declared": (lambda: (struct.pack("<4sI", b"FAQ1", 2**32 - 1), {}), TOO_LARGE),
    "a header that unpacks to a million lists": (lambda: framed(MANY_LISTS), UNUSABLE),
    "a header nested deeply": (lambda: framed(b"[" * 1_000_000), UNUSABLE),
    "invalid UTF-8": (lambda: framed(b'{"prompts": ["\xff\xfe"]}'), UNUSABLE),
    "invalid UTF-8 in a form": (lambda: form(picture(RGB), prompts=b'["\xff\xfe"]'), UNUSABLE),
    "half a surrogate": (lambda: binary([1, 16, 16, 3], ["\ud800"], bytes(768)), UNUSABLE),
    "zero images": (lambda: binary([0, 16, 16, 3], []), UNUSABLE),
    "zero images in a form": (lambda: form(prompts=b"[]"), NOT_JUDGED),
    "10,000 prompts for one image": (lambda: binary([1, 16, 16, 3], TEN_THOUSAND, bytes(768)), UNUSABLE),
    "10,000 prompts and images": (lambda: binary([10_000, 8, 8, 3], TEN_THOUSAND, bytes(1_920_000)), TOO_LARGE),
    "10,000 prompts in a form": (lambda: form(picture(RGB), prompts=[b"p"] * 10_000), UNUSABLE),
    "10,000 prompts as a list in a form": (
        lambda: form(picture(RGB), prompts=json.dumps(TEN_THOUSAND).encode()),
        UNUSABLE,
    ),
    "50,000 × 50,000 pixels declared": (lambda: binary([1, 50_000, 50_000, 3], ["p"]), TOO_LARGE),
    "one pixel": (lambda: binary([1, 1, 1, 3], ["p"], bytes(3)), NOT_JUDGED),
    "fewer bytes than pixels": (lambda: binary([1, 16, 16, 3], ["p"], bytes(767)), UNUSABLE),
    "a PNG of 50,000 × 50,000 pixels": (lambda: form(png_of(50_000)), TOO_LARGE),
    "a PNG of 5,000 × 5,000 pixels": (lambda: form(png_of(5_000)), TOO_LARGE),
    "a PNG of 4,096 × 4,096 pixels without them": (lambda: form(png_of(4_096)), UNUSABLE),
    "four PNGs of 4,096 × 4,096 pixels with one row": (
        lambda: form(*[png_of(4_096, rows(4_096, 1))] * 4, prompts=json.dumps(["p"] * 4).encode()),
        UNUSABLE,
    ),
    "a PNG that lacks its last row": (lambda: form(png_of(64, rows(64, 63))), UNUSABLE),
    "an interlaced PNG that lacks its last row": (lambda: form(png_of(64, rows(64, 1.2), interlaced=1)), UNUSABLE),
    "a JPEG of 4,096 × 4,096 pixels without them": (lambda: form(jpeg_without_blocks(4_096)), UNUSABLE),
    "five whole PNGs of 4,096 × 4,096 pixels": (
        lambda: form(*[png_of(4_096, rows(4_096, 4096))] * 5, prompts=json.dumps(["p"] * 5).encode()),
        TOO_LARGE,
    ),
    "four whole PNGs of 4,096 × 4,096 pixels for one prompt": (
        lambda: form(*[png_of(4_096, rows(4_096, 4096))] * 4),
        NOT_JUDGED,
    ),
    "a whole PNG of 4,096 × 4,096 pixels before one without": (
        lambda: form(png_of(4_096, rows(4_096, 4096)), png_of(4_096, rows(4_096, 4095)), prompts=b'["p", "q"]'),
        UNUSABLE,
    ),
    "a PNG of one pixel": (lambda: form(picture(RGB[:1, :1])), NOT_JUDGED),
    "a truncated PNG": (lambda: form(picture(RGB)[:-60]), UNUSABLE),
    "a truncated JPEG": (lambda: form(picture(np.tile(RGB, (8, 8, 1)), "JPEG")[:700]), UNUSABLE),
    "EPS": (lambda: form(picture(RGB, "EPS")), UNUSABLE),
    "a GIF": (lambda: form(picture(RGB, "GIF")), UNUSABLE),
    "a moving PNG": (lambda: form(picture(RGB, save_all=True, append_images=[Image.fromarray(RGB[::-1])])), NOT_JUDGED),
    "a PNG whose pictures differ in size": (lambda: form(picture(RGB), picture(RGB[:8])), NOT_JUDGED),
    "an empty file": (lambda: form(b""), UNUSABLE),
    "a text file": (lambda: form(b"hello"), UNUSABLE),
    "no token": (lambda: (GOOD, {"Authorization": ""}), UNKNOWN),
    "a wrong token": (lambda: (GOOD, {"Authorization": "Bearer wrong"}), UNKNOWN),
    "a token that is no text": (lambda: (GOOD, {"Authorization": "Bearer \xff"}), UNKNOWN),
    "a wrong token and 2 gigabytes declared": (
        lambda: (GOOD, {"Authorization": "Bearer wrong", "Content-Length": str(2 << 30)}),
        UNKNOWN,
    ),
}


@cache
def sent(name: str) -> Sent:
    """The request ``name``; made when it is asked for, since some take a second."""
    return HOSTILE[name][0]()


def megabytes(server: Server, key: str) -> float:
    """``VmRSS``, what the process holds, or ``VmHWM``, the most it ever held."""
    with open(f"/proc/{server.process.pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024


@pytest.fixture(scope="module")
def guarded(user_file) -> Iterator[Server]:
    """One server that wants a token; every request of this file goes to it."""
    server = Server(f"{user_file}:brightness", "--token-env", "REWARD_TOKEN", env={"REWARD_TOKEN": "right"})
    yield server
    server.kill()


@pytest.fixture
def scores_rightly(guarded, batch, monkeypatch):
    monkeypatch.setenv("OUR_TOKEN", "right")

    def check() -> None:
        scores = HttpScorer(guarded.url, token_env="OUR_TOKEN", retries=0).score(*batch)
        np.testing.assert_array_equal(scores["brightness"], batch[0].mean(axis=(1, 2, 3)))

    check()
    return check


@pytest.fixture(scope="module")
def at_rest(guarded) -> float:
    """What the server holds before the first of them; its peak since then bounds what any of them cost."""
    connection = http.client.HTTPConnection("127.0.0.1", guarded.port, timeout=10)
    connection.request("POST", "/score", GOOD, TOKEN)
    assert connection.getresponse().status == 200
    connection.close()
    return megabytes(guarded, "VmRSS")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_gets_a_typed_4xx_and_costs_little(guarded, at_rest, scores_rightly, name):
    (body, headers), expected = sent(name), HOSTILE[name][1]
    connection = http.client.HTTPConnection("127.0.0.1", guarded.port, timeout=10)
    connection.request("POST", "/score", body, {key: value for key, value in {**TOKEN, **headers}.items() if value})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    assert (response.status, answer["error"]["type"]) == expected, answer
    assert set(answer) == {"error"} and "Traceback" not in answer["error"]["message"]
    assert megabytes(guarded, "VmHWM") - at_rest < MAX_MEGABYTES
    scores_rightly()


def test_two_hundred_hostile_requests_in_a_row_leave_no_memory_behind(guarded, scores_rightly):
    requests = [sent(name) for name in HOSTILE]
    small = [one for one in requests if len(one[0]) < 1 << 20 and "Content-Length" not in one[1]]
    before = megabytes(guarded, "VmRSS")
    connection = http.client.HTTPConnection("127.0.0.1", guarded.port, timeout=10)
    for body, headers in (small * 10)[:200]:
        connection.request("POST", "/score", body, {**TOKEN, **headers})
        response = connection.getresponse()
        assert 400 <= response.status < 500 and json.loads(response.read())["error"]
    connection.close()
    assert megabytes(guarded, "VmRSS") - before < 64
    scores_rightly()


FILES = [picture(RGB), picture(RGB, "JPEG"), picture(Image.fromarray(RGB).convert("P")), picture(RGB, optimize=True)]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(FILES), st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=9)), min_size=1)
)
def test_damaged_files_never_raise_anything_but_a_typed_error(data, damages):
    damaged = bytearray(data)
    for place, scrap in damages:
        start = place % len(damaged)
        damaged[start : start + len(scrap)] = scrap
    try:
        look_at([bytes(damaged)], DEFAULT_LIMITS)
        images = decode([bytes(damaged)])
    except ScorerError:
        return
    assert images.dtype == np.uint8 and images.ndim == 4
