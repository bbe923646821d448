"""Outages of a reward server that retries make up for are counted by cause and named once an iteration."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from flowalign.config.alignment import AlignConfig
from flowalign.config.sections import RewardConfig
from flowalign.record.lock import RunLock
from flowalign.record.metrics import without_times
from flowalign.record.stop import StopRequest
from flowalign.run.journal import RunJournal
from flowalign.run.made import MadeOf
from flowalign.samples.joined import cat_scores
from flowalign.samples.scoring import faults, load_scorers, merge, reward_metrics, score_images
from flowalign.types import Scores
from rewards.http import transport
from rewards.interface import Asked
from rewards.wire import decode_request, encode_response

IMAGES = torch.arange(2 * 8 * 8 * 3).remainder(256).to(torch.uint8).reshape(2, 8, 8, 3)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """A reward server of brightness that first answers with each of ``failures``: a status, or ``drop`` for none."""
    monkeypatch.setattr(transport, "_FIRST_WAIT_S", 0.01)
    servers = []

    def start(*failures: Any) -> str:
        left = list(failures)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(b"{}")

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                failure = left.pop(0) if left else None
                if failure == "drop":
                    self.close_connection = True
                elif failure is not None:
                    self.answer(b'{"error": {"type": "overloaded", "message": "later"}}', failure)
                else:
                    images = decode_request(body).images
                    self.answer(encode_response({"bright": images.reshape(len(images), -1).mean(1)}))

            def answer(self, body: bytes, status: int = 200) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None: ...

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def score(*rewards: RewardConfig, chunks: int = 2) -> Scores:
    scorers = load_scorers(rewards, Path("."))
    parts = [
        [score_images(s, Asked(IMAGES.numpy(), ["a", "b"], [{"tag": "x"}, {}])) for s in scorers] for _ in range(chunks)
    ]
    return cat_scores([merge(part, {s.name: s.weight for s in scorers}) for part in parts])


def reward(url: str, name: str = "bright", **options: Any) -> RewardConfig:
    return RewardConfig(spec=f"url:{url}", name=name, options=options)


def test_a_server_that_fails_twice_and_then_answers_counts_two_retries_and_gives_the_same_scores(serve):
    faulty, sound = serve(503, 503), serve()
    found, expected = score(reward(faulty)), score(reward(sound))
    assert torch.equal(found.total, expected.total) and bool(found.valid.all())
    assert reward_metrics(found)["reward/bright/retries"] == 2
    assert reward_metrics(expected)["reward/bright/retries"] == 0
    assert faults(found) == {"bright": (0, f"2 retries ({faulty}: answered 503, overloaded × 2)")}
    assert faults(expected) == {}


def test_a_connection_that_breaks_is_told_from_one_that_is_refused(serve):
    url = serve("drop", 429)
    said = faults(score(reward(url)))["bright"][1]
    assert said.startswith("2 retries (") and "RemoteDisconnected" in said and "answered 429, overloaded" in said


def test_of_two_addresses_the_one_that_fails_is_named(serve):
    good, bad = serve(), serve(502, 502, 502, 502)
    counts = score(reward(good, replicas=[bad], breaker_failures=9), chunks=6).retries["bright"]
    assert set(counts) == {f"{bad}: answered 502, overloaded"} and sum(counts.values()) == 4


def test_each_reward_has_its_own_count_and_one_that_asks_nobody_has_none(serve, tmp_path: Path):
    (tmp_path / "own.py").write_text("def own(images, prompts, metadata):\n    return [1.0] * len(images)\n")
    own = RewardConfig(spec=f"{tmp_path / 'own.py'}:own")
    metrics = reward_metrics(score(reward(serve(503), "a"), reward(serve(), "b"), own))
    retries = {key: value for key, value in metrics.items() if key.endswith("/retries")}
    assert retries == {"reward/a/retries": 1, "reward/b/retries": 0}


def test_the_health_check_before_the_first_batch_is_no_retry(serve):
    assert score(reward(serve()), chunks=1).retries == {"bright": {}}


def test_retries_are_left_out_where_runs_are_compared():
    assert without_times({"reward/a/retries": 2.0, "reward/a/mean": 1.0, "time/x": 3.0}) == {"reward/a/mean": 1.0}


def test_a_run_names_an_outage_when_it_happens_and_masked_images_when_they_become_more(tmp_path: Path):
    config = AlignConfig.model_validate(
        {"name": "r", "iterations": 9, "algorithm": {"type": "flow_grpo"}, "logging": {"wandb": "disabled"}}
    )
    said = io.StringIO()
    lock = RunLock.take(tmp_path)
    begun = {"start": 0, "wall_s": 0.0, "made": MadeOf(config, tmp_path)}
    journal = RunJournal(config, tmp_path, Console(file=said), **begun, lock=lock, stop=StopRequest())
    nothing = torch.zeros(4)
    for iteration, (masked, retries) in enumerate([(0, 0), (2, 0), (2, 0), (3, 1), (1, 2), (0, 0)], start=1):
        causes = {"clip/nan": masked} if masked else {}
        tried = {"clip": {"http://gpu7: silent": retries}} if retries else {"clip": {}}
        journal.say_faults(f"iteration {iteration}", Scores({}, nothing, nothing == 0, causes, retries=tried))
    journal.close()
    lock.release()
    assert said.getvalue().splitlines() == [
        "reward clip in iteration 2: 2 of 4 images masked (nan × 2)",
        "reward clip in iteration 4: 1 retry (http://gpu7: silent); 3 of 4 images masked (nan × 3)",
        "reward clip in iteration 5: 2 retries (http://gpu7: silent × 2); 1 of 4 images masked (nan)",
    ]


def test_scores_and_retries_of_nothing_are_nothing():
    empty = Scores({}, torch.zeros(2), torch.ones(2, dtype=torch.bool))
    assert cat_scores([empty, empty]).retries == {} and faults(empty) == {}
    assert not [key for key in reward_metrics(empty) if key.endswith("/retries")]
    assert np.isfinite(reward_metrics(empty)["reward/total/std"])
