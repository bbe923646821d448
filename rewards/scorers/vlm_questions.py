"""Yes or no questions about a prompt's parts, answered by a vision-language model: DPG-Bench, DSG, OneIG's alignment.

The score is the share of questions answered yes, where one that presupposes another counts only if that one is yes
(Davidsonian Scene Graph, arXiv:2310.18235, sec. 3; DPG-Bench, arXiv:2403.05135, sec. 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from rewards.http.chat import Chat, final_object
from rewards.interface import Answers, Asked, InputError, Metadata, SpecError

QUESTION = (
    "Look at the image and answer this question: {question}\n"
    'Answer with one JSON object and nothing else: {{"answer": "yes"}} or {{"answer": "no"}}'
)
EXAMPLE = 'questions: ["Is there a dog?", {"question": "Is the dog red?", "after": [0]}]'


class VlmQuestionsScorer(Answers):
    """``vlm_questions`` in [0, 1]: the share of a row's ``questions`` that the model answers yes.

    A question is a text, or ``{"question": …, "after": [0]}`` with the numbers, from 0, of those that it presupposes:
    where one of them is not yes, it counts as no and is not asked. ``url`` is the endpoint up to ``/v1``, ``model`` the
    name it serves; ``question`` is what is sent, with ``{question}`` and ``{prompt}``. A sample with a question that
    got no usable answer in ``repairs`` more tries is NaN, which masks it, never 0. ``concurrency`` images are asked
    about at once; ``token_env`` names the variable that holds the key.
    """

    name = "vlm_questions"
    range = (0.0, 1.0)

    def __init__(
        self,
        *,
        url: str,
        model: str,
        question: str = QUESTION,
        repairs: int = 2,
        temperature: float = 0.0,
        max_tokens: int = 256,
        concurrency: int = 8,
        deadline_s: float = 120.0,
        retries: int = 5,
        token_env: str | None = None,
        device: str = "cpu",
        batch_size: int = 8,
    ) -> None:
        self.question = question
        try:
            self.question.format(question="Is it?", prompt="a prompt")
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            raise SpecError(
                f"vlm_questions: question is no template ({error!r}); it may use {{question}} and {{prompt}}, and "
                "writes other braces twice"
            ) from error
        self.chat = Chat(
            self.name,
            url,
            model,
            repairs=repairs,
            temperature=temperature,
            max_tokens=max_tokens,
            concurrency=concurrency,
            deadline_s=deadline_s,
            retries=retries,
            token_env=token_env,
        )
        self.device = device
        self.batch_size = batch_size

    def check_row(self, metadata: Metadata) -> None:
        """Raise InputError for a row without questions, or with some that presuppose one another in a circle."""
        questions_of(metadata)

    def answer(self, asked: Asked) -> dict[str, np.ndarray]:
        """Return ``{"vlm_questions": (N,)}``, NaN where the model gave no usable answer."""
        with ThreadPoolExecutor(self.chat.concurrency) as pool:
            made = list(pool.map(self._share, asked.images, asked.prompts, asked.metadata))
        return {"vlm_questions": np.array(made, np.float64)}

    def retried(self) -> dict[str, int]:
        """Return how often a question had to be sent again since the last call, by address and cause."""
        return self.chat.endpoint.retried()

    def _share(self, image: np.ndarray, prompt: str, metadata: Metadata) -> float:
        questions = questions_of(metadata)

        @cache
        def yes(number: int) -> float:
            """Return 1, 0, or NaN where nobody knows."""
            text, after = questions[number]
            before = [yes(one) for one in after]
            if 0.0 in before:
                return 0.0
            if any(one != one for one in before):
                return float("nan")
            said = self.chat.ask(image, self.question.format(question=text, prompt=prompt), _yes, '{"answer": "no"}')
            return float("nan") if said is None else float(said)

        return sum(yes(number) for number in range(len(questions))) / len(questions)


def questions_of(metadata: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Return the questions of a row, each with the numbers of those that it presupposes.

    Raises:
        InputError: there is none, or they are of another form.
    """
    listed = metadata.get("questions")
    if not isinstance(listed, list) or not listed:
        raise InputError(f"metadata: has no list `questions`; write {EXAMPLE}")
    found = [_question(number, given, len(listed)) for number, given in enumerate(listed)]
    settled: set[int] = set()
    while new := {n for n, (_, after) in enumerate(found) if n not in settled and settled.issuperset(after)}:
        settled |= new
    if len(settled) < len(found):
        number = min(set(range(len(found))) - settled)
        raise InputError(f"metadata: questions[{number}] presupposes itself, by way of its `after`")
    return found


def _question(number: int, given: Any, count: int) -> tuple[str, tuple[int, ...]]:
    text, after = (given.get("question"), given.get("after")) if isinstance(given, Mapping) else (given, None)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"metadata: questions[{number}] is {str(given)[:40]!r}; write {EXAMPLE}")
    after = [] if after is None else after
    if not isinstance(after, list) or not all(type(one) is int and 0 <= one < count for one in after):
        raise InputError(
            f"metadata: questions[{number}].after is {str(after)[:40]}; write numbers of questions, 0 to {count - 1}"
        )
    return text, tuple(after)


def _yes(answer: str) -> bool:
    """Return whether an answer is yes. Raise ``ValueError`` that says what is wrong with it."""
    said = str(final_object(answer).get("answer")).strip().casefold()
    if said not in ("yes", "no"):
        raise ValueError("its answer is neither yes nor no")
    return said == "yes"
