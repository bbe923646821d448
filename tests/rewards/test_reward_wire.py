from __future__ import annotations

import json
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.interface import Asked, InputError
from rewards.wire import (
    Limits,
    TooLarge,
    WireError,
    check_texts,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
)


def message(header, payload: bytes = b"", magic: bytes = b"FAQ1") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<4sI", magic, len(text)) + text + payload


GOOD = {"shape": [1, 2, 2, 3], "prompts": ["p"], "metadata": [{}]}


def test_a_request_survives_the_round_trip(batch):
    asked = decode_request(encode_request(Asked(*batch)))
    np.testing.assert_array_equal(asked.images, batch[0])
    assert (asked.prompts, asked.metadata) == batch[1:]


def test_a_response_keeps_every_bit_nan_and_inf_included():
    scores = {"a": np.array([0.1, np.nan, -np.inf]), "b": np.array([1e30, -0.0, 5e-324])}
    back = decode_response(encode_response(scores), 3)
    assert list(back) == ["a", "b"]
    assert all(back[name].tobytes() == scores[name].tobytes() for name in scores)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"FAQ1",
        pickle.dumps({"images": 1}),
        message(GOOD, bytes(12), magic=b"FAS1"),
        message(b"\xff\xfe{}", bytes(12)),
        message(b"{not json", bytes(12)),
        message(b"[" * 100_000, bytes(12)),
        message([], bytes(12)),
        message({}, bytes(12)),
        message({**GOOD, "shape": [1, 2, 2, 4]}, bytes(16)),
        message({**GOOD, "shape": [1, 2, -2, 3]}, bytes(12)),
        message({**GOOD, "shape": [1, 2, 2.0, 3]}, bytes(12)),
        message({**GOOD, "shape": [0, 2, 2, 3], "prompts": [], "metadata": []}),
        message(GOOD, bytes(11)),
        message(GOOD, bytes(13)),
        message({**GOOD, "prompts": ["p", "q"]}, bytes(12)),
        message({**GOOD, "prompts": [1]}, bytes(12)),
        message({**GOOD, "prompts": ["\ud800"]}, bytes(12)),
        message({**GOOD, "metadata": [1]}, bytes(12)),
        message({**GOOD, "metadata": {}}, bytes(12)),
        message(b'{"shape": [1, 2, 2, 3], "prompts": ["p"], "metadata": [{}], "shape": [1, 2, 2, 3]}', bytes(12)),
        struct.pack("<4sI", b"FAQ1", 1000) + b"{}",
    ],
)
def test_malformed_requests_are_refused_with_a_typed_error(data):
    with pytest.raises(WireError):
        decode_request(data)


@pytest.mark.parametrize(
    ("data", "limits"),
    [
        (message(GOOD, bytes(12)), Limits(max_bytes=20)),
        (message(GOOD, bytes(12)), Limits(max_pixels=3)),
        (message({**GOOD, "shape": [9, 2, 2, 3]}, bytes(108)), Limits(max_count=8)),
        (message(GOOD, bytes(12)), Limits(max_header_bytes=4)),
        (message({**GOOD, "shape": [1, 50_000, 50_000, 3]}), Limits()),
        (struct.pack("<4sI", b"FAQ1", 2**32 - 1), Limits()),
    ],
)
def test_messages_over_a_limit_are_refused_as_too_large(data, limits):
    with pytest.raises(TooLarge, match="limit"):
        decode_request(data, limits)


@pytest.mark.parametrize(
    "data",
    [
        message({"names": ["a"], "count": 2}, bytes(16), magic=b"FAS1"),
        message({"names": ["a"], "count": 3}, bytes(16), magic=b"FAS1"),
        message({"names": ["a", "a"], "count": 3}, bytes(48), magic=b"FAS1"),
        message({"names": "a", "count": 3}, bytes(24), magic=b"FAS1"),
        message({"names": [], "count": 3}, magic=b"FAS1"),
        message(b'{"names": ["a"], "names": ["b"], "count": 3}', bytes(24), magic=b"FAS1"),
        message({"names": ["a"], "count": 3.0}, bytes(24), magic=b"FAS1"),
        message({"names": [str(i) for i in range(65)], "count": 3}, bytes(24 * 65), magic=b"FAS1"),
        b"<html>",
    ],
)
def test_a_response_for_another_number_of_images_or_no_response_is_refused(data):
    with pytest.raises(WireError):
        decode_response(data, 3)


def test_metadata_that_is_not_json_and_images_that_do_not_fit_are_refused_before_sending(batch):
    images, prompts, metadata = batch
    with pytest.raises(WireError, match="plain JSON"):
        encode_request(Asked(images, prompts, [{"array": np.zeros(2)}] * 5))
    with pytest.raises(WireError, match="plain JSON"):
        encode_request(Asked(images, prompts, [{"x": float("nan")}] * 5))
    with pytest.raises(InputError):
        encode_request(Asked(images, prompts[:4], metadata))


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(data):
    for raw in (data, b"FAQ1" + data, message(data)):
        with pytest.raises(WireError):
            decode_request(raw)


def test_prompts_of_another_number_are_counted_in_the_error():
    with pytest.raises(WireError, match="form: 1 prompts for 2 images"):
        check_texts(["one"], [{}, {}], 2, "form")
