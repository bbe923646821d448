"""Several addresses of one reward: in turn, the next at once where one fails, a breaker for those that keep failing."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest

from rewards.http import transport
from rewards.http.client import DeadlineExceeded, HttpScorer, ServerRefused, ServerUnavailable
from rewards.http.replicas import Replicas
from rewards.interface import SpecError
from rewards.resolve import check, resolve


@pytest.fixture
def closed_url() -> Iterator[str]:
    """An address that refuses every connection."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
def no_patience(monkeypatch):
    """A wait between tries would be seen."""
    monkeypatch.setattr(transport, "_FIRST_WAIT_S", 60)
    monkeypatch.setattr(transport, "_LONGEST_WAIT_S", 60)


def scored_images(server) -> int:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith("flowalign_reward_images_total")))


def assert_right(scorer: HttpScorer, batch) -> None:
    np.testing.assert_array_equal(scorer.score(*batch)["brightness"], batch[0].mean(axis=(1, 2, 3)))


def test_batches_go_to_the_replicas_in_turn(shared_server, serve_reward, batch):
    one, other = shared_server("brightness"), serve_reward("brightness")
    before = scored_images(one)
    scorer = HttpScorer(one.url, replicas=[other.url], batch_size=1)
    assert_right(scorer, batch)
    assert_right(scorer, batch)
    assert (scored_images(one) - before, scored_images(other)) == (5, 5)


@pytest.mark.fault
@pytest.mark.usefixtures("no_patience")
def test_a_dead_replica_costs_neither_a_wait_nor_an_answer(shared_server, closed_url, batch):
    began = time.monotonic()
    assert_right(HttpScorer(closed_url, replicas=[shared_server("brightness").url], batch_size=1), batch)
    assert time.monotonic() - began < 30


@pytest.mark.fault
@pytest.mark.usefixtures("no_patience")
def test_a_batch_whose_server_dies_over_it_is_scored_by_the_next(shared_server, serve_reward, batch):
    deadly = serve_reward("deadly")
    scorer = HttpScorer(deadly.url, replicas=[shared_server("brightness").url], batch_size=1)
    assert_right(scorer, batch)
    assert deadly.process.wait(timeout=10) == 9
    assert_right(scorer, batch)


@pytest.mark.fault
def test_a_silent_replica_takes_its_share_of_the_time_once_and_is_left_out_then(shared_server, serve_reward, batch):
    stopped = serve_reward("brightness")
    os.kill(stopped.process.pid, signal.SIGSTOP)
    other = shared_server("brightness").url
    scorer = HttpScorer(stopped.url, replicas=[other], deadline_s=4, batch_size=1, breaker_failures=1)
    began = time.monotonic()
    assert_right(scorer, batch)
    assert time.monotonic() - began > 1.9


@pytest.mark.fault
def test_a_replica_that_comes_back_gets_batches_again(shared_server, serve_reward, batch):
    gone = serve_reward("brightness")
    scorer = HttpScorer(
        gone.url,
        replicas=[shared_server("brightness").url],
        batch_size=1,
        breaker_failures=1,
        breaker_reset_s=0.2,
    )
    gone.kill()
    assert_right(scorer, batch)
    back = serve_reward("brightness", port=gone.port)
    time.sleep(0.2)
    assert_right(scorer, batch)
    assert scored_images(back) >= 2


@pytest.mark.fault
def test_threads_lose_no_answer_when_one_of_two_servers_is_killed(shared_server, serve_reward, batch):
    victim = serve_reward("brightness")
    scorer = HttpScorer(victim.url, replicas=[shared_server("brightness").url], batch_size=2)
    direct, right = batch[0].mean(axis=(1, 2, 3)), []

    def ask() -> None:
        for _ in range(20):
            right.append(scorer.score(*batch)["brightness"].tolist() == direct.tolist())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(right) < 20:
        time.sleep(0.01)
    os.kill(victim.process.pid, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert right == [True] * 160


@pytest.mark.fault
def test_when_all_fail_there_is_a_wait_and_the_error_names_each_address_and_its_cause(closed_url, batch, monkeypatch):
    monkeypatch.setattr(transport, "_FIRST_WAIT_S", 0.4)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def busy() -> None:
            for _ in range(2):
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy")
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1 << 20):
                        pass

        thread = threading.Thread(target=busy)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ServerUnavailable, match="after 2 tries; start it with") as caught:
            HttpScorer(closed_url, replicas=[url], retries=1).score(*batch)
        assert time.monotonic() - began > 0.2
        thread.join()
    assert f"{closed_url}: ConnectionRefusedError" in str(caught.value)
    assert f"{url}: answered 503" in str(caught.value)


@pytest.mark.fault
def test_one_deadline_bounds_the_tries_at_all_replicas(serve_reward, closed_url, batch):
    stopped = serve_reward("brightness")
    os.kill(stopped.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises((DeadlineExceeded, ServerUnavailable)) as caught:
        HttpScorer(f"{stopped.url},{closed_url}", deadline_s=1).score(*batch)
    assert time.monotonic() - began < 30
    assert f"{stopped.url}: silent" in str(caught.value) and f"{closed_url}: Connection" in str(caught.value)


def test_what_another_server_cannot_cure_is_not_sent_to_it(shared_server, batch):
    scorer = HttpScorer(shared_server("broken").url, replicas=[shared_server("brightness").url], batch_size=1)
    with pytest.raises(ServerRefused, match="secret of line one"):
        scorer.score(*batch)


def test_scores_of_two_rewards_are_never_mixed(shared_server, batch):
    scorer = HttpScorer(shared_server("brightness").url, replicas=[shared_server("echo").url], batch_size=1)
    with pytest.raises(ServerRefused, match="serve one and the same reward at every address"):
        scorer.score(*batch)


def test_set_up_passes_with_one_healthy_replica_and_warns_of_the_others(shared_server, closed_url, caplog):
    healthy = shared_server("brightness").url
    with caplog.at_level(logging.WARNING, logger="rewards"):
        HttpScorer(closed_url, replicas=[healthy]).setup("cpu")
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        f"reward server {closed_url} is not reachable"
    ]
    with pytest.raises(ServerUnavailable, match=closed_url):
        HttpScorer(closed_url, retries=0).setup("cpu")


@pytest.mark.parametrize(
    "spec",
    [
        "url:http://a:1,http://b:2",
        {"type": "url:http://a:1", "replicas": ["http://b:2/"]},
        {"type": "url:http://a:1", "replicas": "http://b:2"},
    ],
)
def test_replicas_are_named_in_the_spec_or_as_an_option(spec):
    check(spec)
    scorer = resolve(spec)
    assert isinstance(scorer, HttpScorer) and scorer.endpoint.addresses == ["http://a:1", "http://b:2"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"replicas": ["b:2"]}, "'b:2' is not an address"),
        ({"replicas": [8000]}, "'8000' is not an address"),
        ({"replicas": ["http://[b"]}, "bad port or host"),
        ({"replicas": ["http://a:1/"]}, "given twice"),
        ({"breaker_failures": 0}, "breaker_failures must be >= 1"),
        ({"breaker_resets": 1}, "did you mean 'breaker_reset_s'"),
    ],
)
def test_a_wrong_replica_or_breaker_is_one_sentence_when_the_configuration_is_checked(options, said):
    with pytest.raises(SpecError, match=said):
        check({"type": "url:http://a:1", **options})


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def asked(replicas: Replicas[str]) -> str:
    """The order of a round in which everybody fails, without counting it."""
    return "".join(replica.address for replica, _ in replicas.round())


def of(replicas: Replicas[str], address: str):
    return next(replica for replica in replicas.all if replica.address == address)


def test_a_round_asks_each_once_and_the_next_begins_with_the_next(clock):
    replicas = Replicas("abc", clock=clock)
    first = [next(replicas.round())[0].address for _ in range(6)]
    assert "".join(first) in "abcabcabcabc"
    assert sorted(asked(replicas)) == ["a", "b", "c"]
    assert [choices for _, choices in replicas.round()] == [3, 2, 1]


def test_three_failures_in_a_row_open_the_breaker_and_fewer_do_not(clock):
    replicas = Replicas("ab", clock=clock)
    a = of(replicas, "a")
    for _ in range(2):
        replicas.failed(a, "why")
    replicas.answered(a)
    for _ in range(2):
        replicas.failed(a, "why")
    assert sorted(asked(replicas)) == ["a", "b"]
    replicas.failed(a, "why")
    clock.now = 29.9
    assert asked(replicas) == asked(replicas) == "b"


def test_after_the_reset_time_there_is_one_trial_which_closes_or_opens_it_again(clock):
    replicas = Replicas("ab", breaker_failures=1, clock=clock)
    a = of(replicas, "a")
    replicas.failed(a, "why")
    clock.now = 30
    assert sorted(asked(replicas)) == ["a", "b"]
    assert asked(replicas) == "b"  # the trial is still running
    replicas.failed(a, "why")
    clock.now = 59
    assert asked(replicas) == "b"
    clock.now = 60
    assert sorted(asked(replicas)) == ["a", "b"]
    replicas.answered(a)
    assert sorted(asked(replicas)) == ["a", "b"] == sorted(asked(replicas))


def test_where_all_would_be_left_out_none_is(clock):
    replicas = Replicas("ab", breaker_failures=1, clock=clock)
    for replica in replicas.all:
        replicas.failed(replica, "why")
    assert sorted(asked(replicas)) == ["a", "b"]
