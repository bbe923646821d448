"""Yes or no questions to a model behind a real HTTP server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rewards.interface import Asked, InputError, SpecError, score_batch
from rewards.resolve import resolve, row_check
from tests.rewards._chat_server import ChatServer, Request

DOG, RED, RUNS = "Is there a dog?", "Is the dog red?", "Does the red dog run?"
CHAIN = [DOG, {"question": RED, "after": [0]}, {"question": RUNS, "after": [1]}]


@pytest.fixture
def server() -> Iterator[ChatServer]:
    """Image i is filled with i: of 0 all is true, of 1 nothing, of 2 the dog alone, and 3 is not understood."""

    def answer(request: Request) -> str:
        number = int(request.image[0, 0, 0])
        if number == 3:
            return "who knows"
        return '{"answer": "yes"}' if number == 0 or (number == 2 and DOG in request.question) else '{"answer": "No"}'

    started = ChatServer(answer)
    yield started
    started.close()


def asked(count: int, questions: list[Any]) -> Asked:
    images = np.repeat(np.arange(count, dtype=np.uint8), 8 * 8 * 3).reshape(count, 8, 8, 3)
    return Asked(images, ["a red dog runs"] * count, [{"questions": questions}] * count)


def scorer(server: ChatServer, **options: Any) -> Any:
    return resolve({"type": "vlm_questions", "url": server.url, "model": "judge", "repairs": 1, **options})


def test_the_score_is_the_share_of_yes_and_what_presupposes_a_no_is_no_and_not_asked(server: ChatServer) -> None:
    found = score_batch("vlm_questions", scorer(server), asked(4, CHAIN))
    assert found.scores["vlm_questions"][:3].tolist() == pytest.approx([1, 0, 1 / 3])
    assert np.isnan(found.scores["vlm_questions"][3]) and found.causes["vlm_questions"] == {"nan": 1}
    asked_of = [sum(int(request.image[0, 0, 0]) == number for request in server.requests) for number in range(4)]
    assert asked_of == [3, 1, 2, 2]  # the last one twice the same, once repaired


def test_a_question_may_presuppose_a_later_one(server: ChatServer) -> None:
    turned = [{"question": RED, "after": [1]}, DOG]
    assert scorer(server).answer(asked(3, turned))["vlm_questions"].tolist() == [1, 0, 0.5]


def test_a_template_of_ones_own_is_asked(server: ChatServer) -> None:
    scorer(server, question="{prompt}? {question} JSON: {{}}").answer(asked(1, [DOG]))
    assert server.requests[0].question == f"a red dog runs? {DOG} JSON: {{}}"
    with pytest.raises(SpecError, match="question is no template"):
        scorer(server, question="{prompts}")


@pytest.mark.parametrize(
    ("questions", "said"),
    [
        (None, "has no list `questions`"),
        ([], "has no list `questions`"),
        ([DOG, 7], r"questions\[1\] is '7'"),
        ([{"question": DOG, "after": [1]}], r"questions\[0\].after is \[1\]; write numbers of questions, 0 to 0"),
        ([{"question": DOG, "after": [1]}, {"question": RED, "after": [0]}], r"questions\[0\] presupposes itself"),
    ],
)
def test_rows_that_cannot_be_asked_about_are_refused_before_anything_is(questions: Any, said: str) -> None:
    judges = row_check({"type": "vlm_questions", "url": "http://127.0.0.1:1/v1", "model": "judge"})
    assert judges is not None
    judges({"questions": CHAIN})
    with pytest.raises(InputError, match=said):
        judges({"prompt": "a", "questions": questions})
