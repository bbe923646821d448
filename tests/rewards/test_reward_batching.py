"""Concurrent requests merged into model batches."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rewards.interface import Asked, InputError
from rewards.serving.batching import Batching, Merger, Overloaded, Stopping


class Recorder:
    """Scores an image by its first pixel; remembers the batches, waits where told, dislikes some metadata."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, asked):
        images, prompts = asked.images, asked.prompts
        self.gate.wait(10)
        self.sizes.append(len(images))
        if any(row.get("bad") for row in asked.metadata):
            raise InputError("bad row")
        return {"first": images[:, 0, 0, 0].astype(float), "length": np.array([float(len(p)) for p in prompts])}


def request(first: int, count: int = 2, size: int = 8, **row):
    images = np.full((count, size, size, 3), first, np.uint8)
    return images, ["x" * first] * count, [row] * count


@pytest.fixture
def recorder():
    return Recorder()


def merged(recorder, requests, **options):
    """Submit while the first batch is held, so that the rest is there together."""
    merger = Merger(recorder, batching=Batching(max_wait_s=0.05, **options))
    recorder.gate.clear()
    first = merger.submit(Asked(*request(1)))
    time.sleep(0.1)
    futures = [merger.submit(Asked(*each)) for each in requests]
    recorder.gate.set()
    first.result(5)
    return merger, futures


def test_requests_that_wait_together_are_one_batch_and_each_gets_its_own_rows(recorder):
    merger, futures = merged(recorder, [request(k) for k in range(2, 7)])
    for k, future in enumerate(futures, start=2):
        answer = future.result(5)
        assert answer["first"].tolist() == [k, k] and answer["length"].tolist() == [k, k]
    assert recorder.sizes == [2, 10]
    merger.close()


def test_a_batch_stays_within_its_limit_and_nothing_is_lost(recorder):
    merger, futures = merged(recorder, [request(k, count=3) for k in range(2, 9)], max_images=7)
    assert [f.result(5)["first"][0] for f in futures] == list(range(2, 9))
    assert max(recorder.sizes) <= 7 and sum(recorder.sizes) == 2 + 21
    merger.close()


def test_images_of_different_sizes_are_never_one_batch(recorder):
    merger, futures = merged(recorder, [request(k, size=8 + 8 * (k % 2)) for k in range(2, 8)])
    assert [f.result(5)["first"][0] for f in futures] == list(range(2, 8))
    assert sum(recorder.sizes) == 14
    merger.close()


def test_one_callers_bad_metadata_fails_that_caller_only(recorder):
    merger, futures = merged(recorder, [request(2), request(3, bad=True), request(4)])
    assert futures[0].result(5)["first"].tolist() == [2, 2]
    with pytest.raises(InputError, match="bad row"):
        futures[1].result(5)
    assert futures[2].result(5)["first"].tolist() == [4, 4]
    merger.close()


def test_a_limit_below_a_request_still_scores_it_alone(recorder):
    merger = Merger(recorder, batching=Batching(max_images=1))
    assert merger.submit(Asked(*request(5, count=6))).result(5)["first"].tolist() == [5] * 6
    merger.close()


def test_too_many_waiting_images_are_refused_and_the_count_comes_back_to_zero(recorder):
    merger = Merger(recorder, batching=Batching(max_pending=5))
    recorder.gate.clear()
    held = merger.submit(Asked(*request(1, count=4)))
    with pytest.raises(Overloaded, match="4 images are waiting, limit 5"):
        merger.submit(Asked(*request(2, count=2)))
    recorder.gate.set()
    held.result(5)
    assert merger.submit(Asked(*request(2, count=5))).result(5)["first"].tolist() == [2] * 5
    merger.close()
    assert merger.pending == 0
    with pytest.raises(Stopping):
        merger.submit(Asked(*request(1)))


def test_a_hundred_threads_each_get_their_own_answer(recorder):
    merger = Merger(recorder)
    with ThreadPoolExecutor(100) as pool:
        answers = list(
            pool.map(lambda k: merger.submit(Asked(*request(k % 200))).result(20)["first"].tolist(), range(400))
        )
    assert answers == [[k % 200] * 2 for k in range(400)]
    assert sum(recorder.sizes) == 800 and len(recorder.sizes) < 400
    merger.close()


def test_a_caller_that_no_longer_waits_is_left_out_and_the_others_are_answered(recorder):
    merger = Merger(recorder, batching=Batching(max_wait_s=0.05))
    recorder.gate.clear()
    held = merger.submit(Asked(*request(1)))
    time.sleep(0.1)
    left, stays = merger.submit(Asked(*request(2))), merger.submit(Asked(*request(3)))
    assert left.cancel()
    recorder.gate.set()
    assert held.result(5)["first"].tolist() == [1, 1] and stays.result(5)["first"].tolist() == [3, 3]
    assert recorder.sizes == [2, 2]
    merger.close()
    assert merger.pending == 0
