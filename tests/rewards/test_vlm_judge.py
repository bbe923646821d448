"""The judge behind an OpenAI-compatible endpoint, against a real HTTP server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from rewards.http import transport
from rewards.http.transport import DeadlineExceeded, ServerRefused, ServerUnavailable
from rewards.interface import Asked, InputError, SpecError, score_batch
from rewards.resolve import resolve
from rewards.scorers.vlm_judge import VlmJudgeScorer
from tests.rewards._chat_server import ChatServer, Reply, Request

GOOD = '{"score": 7}'


@pytest.fixture
def chat() -> Iterator[Callable[..., ChatServer]]:
    """Starts a server that answers with a function of the request, or always with the same."""
    servers: list[ChatServer] = []

    def start(answer: Callable[[Request], Reply] | Reply) -> ChatServer:
        servers.append(ChatServer(answer if callable(answer) else lambda request: answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def short_waits(monkeypatch):
    monkeypatch.setattr(transport, "_FIRST_WAIT_S", 0.02)


def judge(server: ChatServer, **options) -> VlmJudgeScorer:
    scorer = resolve({"type": "vlm_judge", "url": server.url, "model": "judge", **options})
    assert isinstance(scorer, VlmJudgeScorer)
    return scorer


def pictures(count: int = 1, height: int = 6, width: int = 9) -> np.ndarray:
    """Image i is filled with i."""
    return np.repeat(np.arange(count, dtype=np.uint8), height * width * 3).reshape(count, height, width, 3)


def scores(scorer: VlmJudgeScorer, count: int = 1) -> np.ndarray:
    return scorer.score(pictures(count), [f"prompt {i}" for i in range(count)], [{}] * count)["vlm_judge"]


@pytest.mark.parametrize(
    ("answer", "low", "high", "score"),
    [
        ('{"score": 7}', 0, 10, 0.7),
        ('{"score": 4.5, "reason": "good"}', 1, 5, 0.875),
        ('{"score": 10}', 0, 10, 1.0),
        ('{"score": -1}', -1, 1, 0.0),
    ],
)
def test_the_models_number_is_scaled_to_0_to_1(chat, answer, low, high, score):
    assert scores(judge(chat(answer), low=low, high=high)) == pytest.approx([score], abs=1e-12)


def test_the_request_is_a_chat_completion_with_the_prompt_the_scale_and_the_options(chat):
    server = chat('{"score": 3}')
    scorer = judge(server, low=1, high=5, temperature=0.5, max_tokens=33)
    scorer.score(pictures(), ["a {red} circle"], [{}])
    (request,) = server.requests
    assert request.path == "/v1/chat/completions" and request.token is None
    assert {key: request.body[key] for key in ("model", "temperature", "max_tokens")} == {
        "model": "judge",
        "temperature": 0.5,
        "max_tokens": 33,
    }
    assert "a {red} circle" in request.question and "from 1 (" in request.question and "to 5 (" in request.question
    assert '{"score": <number from 1 to 5>}' in request.question


def test_the_picture_arrives_as_a_png_of_the_very_pixels(chat):
    server = chat(GOOD)
    image = np.random.default_rng(0).integers(0, 256, (1, 7, 13, 3), dtype=np.uint8)
    judge(server).score(image, ["p"], [{}])
    np.testing.assert_array_equal(server.requests[0].image, image[0])


@pytest.mark.parametrize(
    "answer",
    [
        'I looked at it closely. {"score": 7} I hope this helps.',
        '```json\n{"score": 7}\n```',
        '```\n{\n  "score": 7.0,\n  "why": {"colour": "right"}\n}\n```',
        '<think>{it could be {"score": 2}} or more</think> {"why": "a } brace", "score": 7}',
        '{"score": 2} was my first thought, but I settle on {"score": 7}.',
    ],
)
def test_a_score_in_prose_or_a_fence_is_found_and_the_last_one_counts(chat, answer):
    server = chat(answer)
    assert scores(judge(server)) == pytest.approx([0.7])
    assert len(server.requests) == 1


BAD = {
    "seven": "it does not end in a valid JSON object",
    '{"score": 7,}': "it does not end in a valid JSON object",
    '{"parts": {"score": 7}, "score": }': "it does not end in a valid JSON object",
    '{"rating": 7}': "it has no number called score",
    '{"score": true}': "it has no number called score",
    '{"score": "7"}': "it has no number called score",
    '{"score": null}': "it has no number called score",
    '{"score": 11}': "its score 11 is not between 0 and 10",
    '{"score": -0.5}': "its score -0.5 is not between 0 and 10",
    '{"score": NaN}': "its score nan is not between 0 and 10",
    '{"score": 1e999}': "its score inf is not between 0 and 10",
    '{"score": 1' + 400 * "0" + "}": "its score 10000000000000000000 is not between 0 and 10",
    "": "it does not end in a valid JSON object",
}


@pytest.mark.parametrize("bad", BAD)
def test_an_unusable_answer_is_asked_for_again_with_what_was_wrong(chat, bad):
    server = chat(lambda request: bad if len(request.messages) == 1 else GOOD)
    assert scores(judge(server)) == pytest.approx([0.7])
    first, second = server.requests
    assert second.messages[0] == first.messages[0]
    assert second.messages[1] == {"role": "assistant", "content": bad}
    assert second.messages[2]["role"] == "user"
    assert f"not usable: {BAD[bad]}." in second.messages[2]["content"]
    assert '{"score": 0}' in second.messages[2]["content"]


def test_an_answer_without_text_is_asked_for_again(chat):
    server = chat(lambda request: None if len(request.messages) == 1 else GOOD)
    assert scores(judge(server)) == pytest.approx([0.7])


def test_the_conversation_grows_with_every_repair(chat):
    server = chat(lambda request: "no" if len(request.messages) < 7 else GOOD)
    assert scores(judge(server, repairs=3)) == pytest.approx([0.7])
    assert [len(request.messages) for request in server.requests] == [1, 3, 5, 7]


def test_a_sample_that_is_never_repaired_is_nan_and_the_others_keep_their_scores(chat):
    server = chat(lambda request: "no idea" if request.image[0, 0, 0] == 1 else GOOD)
    checked = score_batch("vlm_judge", judge(server, repairs=2), Asked(pictures(3), ["a", "b", "c"], [{}] * 3))
    np.testing.assert_array_equal(checked.scores["vlm_judge"], [0.7, np.nan, 0.7])
    assert checked.valid["vlm_judge"].tolist() == [True, False, True]
    assert checked.causes["vlm_judge"] == {"nan": 1}
    assert len(server.requests) == 1 + 3 + 1


def test_without_repairs_a_bad_answer_is_asked_for_once(chat):
    server = chat("no")
    assert np.isnan(scores(judge(server, repairs=0))).all()
    assert len(server.requests) == 1


@pytest.mark.usefixtures("short_waits")
def test_an_overloaded_server_is_asked_again_and_a_dead_one_ends_the_batch(chat):
    statuses = iter([503, 429, 502])
    server = chat(lambda request: (status, b"busy") if (status := next(statuses, None)) else GOOD)
    assert scores(judge(server)) == pytest.approx([0.7])
    assert len(server.requests) == 4
    with pytest.raises(ServerUnavailable, match="after 2 tries; start the model's server"):
        scores(judge(chat((503, b"busy")), retries=1))


def test_a_refusal_ends_the_batch_at_once_with_the_servers_own_words(chat):
    error = json.dumps({"error": {"type": "invalid_api_key", "message": "wrong key"}}).encode()
    server = chat((401, error))
    with pytest.raises(ServerRefused, match=r"401, invalid_api_key.*wrong key") as caught:
        scores(judge(server, concurrency=2), 40)
    assert caught.value.status == 401
    assert len(server.requests) < 40


@pytest.mark.parametrize(
    "body",
    [b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"text": "7"}]}', b'{"choices": [{"message": "7"}]}'],
)
def test_an_answer_in_another_form_is_an_input_error_that_names_the_endpoint(chat, body):
    server = chat((200, body))
    with pytest.raises(InputError, match=f"{server.url} did not answer in the form of /v1/chat/completions"):
        scores(judge(server))


def test_the_token_is_sent_and_an_empty_variable_is_named(chat, monkeypatch):
    server = chat(GOOD)
    scorer = judge(server, token_env="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    scores(scorer)
    assert server.requests[0].token == "Bearer s3cret"
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(SpecError, match="JUDGE_KEY"):
        scores(scorer)


def test_requests_run_together_up_to_concurrency_and_scores_keep_their_order(chat):
    together = threading.Barrier(4)
    lock, now, most = threading.Lock(), 0, 0

    def answer(request: Request) -> str:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        value = int(request.image[0, 0, 0])
        assert f"prompt {value}\n" in request.question
        together.wait(timeout=20)  # opens only where four requests are here at once
        time.sleep(0.01 * (4 - value % 4))
        with lock:
            now -= 1
        return json.dumps({"score": value})

    got = scores(judge(chat(answer), concurrency=4, high=16), 12)
    np.testing.assert_allclose(got, np.arange(12) / 16)
    assert most == 4


def test_a_model_that_does_not_answer_in_time_is_a_typed_error(chat):
    done = threading.Event()
    server = chat(lambda request: str(done.wait(20)))
    with pytest.raises(DeadlineExceeded, match=r"within 0\.3 s"):
        scores(judge(server, deadline_s=0.3))
    done.set()


def test_a_question_of_ones_own_is_asked(chat):
    server = chat(GOOD)
    question = 'Is "{prompt}" pretty, {low} to {high}? JSON: {{"score": 1}}'
    judge(server, question=question, high=2.5 * 4).score(pictures(), ["a {cat}"], [{}])
    assert server.requests[0].question == 'Is "a {cat}" pretty, 0 to 10? JSON: {"score": 1}'


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"question": "{promt}"}, "question is no template.*promt"),
        ({"question": "{}"}, "question is no template"),
        ({"question": 'JSON: {"score": 1}'}, "writes other braces twice"),
        ({"question": "{prompt"}, "question is no template"),
        ({"question": "{prompt.x}"}, "question is no template"),
        ({"question": "{low:.1f}"}, "question is no template"),
        ({"low": 5, "high": 5}, "low must be the smaller"),
        ({"low": float("nan")}, "low must be the smaller"),
        ({"repairs": -1}, "repairs must be >= 0"),
        ({"concurrency": 0}, "concurrency >= 1"),
        ({"deadline_s": 0}, "deadline_s must be > 0"),
        ({"url": "localhost:8000"}, "is not an address"),
        ({"modell": "x"}, "did you mean 'model'"),
    ],
)
def test_a_specification_that_cannot_work_is_refused_before_anything_is_asked(options, said):
    with pytest.raises(SpecError, match=said):
        resolve({"type": "vlm_judge", "url": "http://127.0.0.1:1/v1", "model": "judge", **options})
