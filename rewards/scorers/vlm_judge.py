"""A vision-language model as the judge, behind any OpenAI-compatible endpoint (vLLM, SGLang, a hosted one)."""

from __future__ import annotations

import base64
import io
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from rewards.http.transport import Endpoint
from rewards.interface import Answers, Asked, InputError, SpecError

_log = logging.getLogger("rewards.vlm_judge")

QUESTION = (
    "Rate how well the image shows what this prompt asks for, from {low} (not at all) to {high} (in every detail).\n"
    "Prompt: {prompt}\n"
    'Answer with one JSON object and nothing else: {{"score": <number from {low} to {high}>}}'
)
AGAIN = 'That was not usable: {problem}. Answer with one JSON object and nothing else, such as {{"score": {low}}}.'


class VlmJudgeScorer(Answers):
    """``vlm_judge`` in [0, 1]: the model's score of each image, ``low`` to ``high``, scaled.

    ``url`` is the endpoint up to ``/v1``, ``model`` the name it serves. ``question`` may use ``{prompt}``, ``{low}``
    and ``{high}``. The JSON object at the end of an answer counts; an answer without a usable one is asked for again,
    ``repairs`` times, with what was wrong. A sample without a usable answer is NaN, which masks it, never 0. Transport
    errors end the batch as those of ``url:`` rewards do. ``concurrency`` requests are on their way at once, whatever
    ``device`` and ``batch_size`` say; ``token_env`` names the variable that holds the key.
    """

    name = "vlm_judge"
    range = (0.0, 1.0)

    def __init__(
        self,
        *,
        url: str,
        model: str,
        question: str = QUESTION,
        low: float = 0,
        high: float = 10,
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
        if not low < high:
            raise SpecError(f"vlm_judge: low is {low} and high {high}; low must be the smaller")
        if repairs < 0 or concurrency < 1:
            raise SpecError("vlm_judge: repairs must be >= 0 and concurrency >= 1")
        self.model, self.question = model, question
        self.low, self.high = low, high
        self._check_question()
        self.endpoint = Endpoint(
            url,
            what="vlm_judge",
            hint="start the model's server or correct the url, which ends in /v1",
            deadline_s=deadline_s,
            retries=retries,
            token_env=token_env,
        )
        self.repairs = repairs
        self.options = {"temperature": temperature, "max_tokens": max_tokens}
        self.concurrency = concurrency
        self.device = device
        self.batch_size = batch_size

    def _check_question(self) -> None:
        try:
            self._asked("a prompt")
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            raise SpecError(
                f"vlm_judge: question is no template ({error!r}); it may use {{prompt}}, {{low}} and {{high}}, "
                "and writes other braces twice"
            ) from error

    def answer(self, asked: Asked) -> dict[str, np.ndarray]:
        """Return ``{"vlm_judge": (N,)}``, NaN where the model gave no usable answer."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return {"vlm_judge": np.array(list(pool.map(self._judge, asked.images, asked.prompts)), np.float64)}

    def retried(self) -> dict[str, int]:
        """Return how often a question had to be sent again since the last call, by address and cause."""
        return self.endpoint.retried()

    def _judge(self, image: np.ndarray, prompt: str) -> float:
        """Ask about one image (H, W, 3), and ask again where the answer cannot be used."""
        picture = {"type": "image_url", "image_url": {"url": data_url(image)}}
        question = {"type": "text", "text": self._asked(prompt)}
        messages: list[dict[str, Any]] = [{"role": "user", "content": [picture, question]}]
        problem = ""
        for _ in range(self.repairs + 1):
            answer = self._ask(messages)
            try:
                return (self._number(answer) - self.low) / (self.high - self.low)
            except ValueError as error:
                problem = str(error)
            again = AGAIN.format(problem=problem, low=f"{self.low:g}")
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": again}]
        _log.warning("no usable answer for %r after %d tries: %s", prompt[:80], self.repairs + 1, problem)
        return float("nan")

    def _asked(self, prompt: str) -> str:
        return self.question.format(prompt=prompt, low=f"{self.low:g}", high=f"{self.high:g}")

    def _ask(self, messages: list[dict[str, Any]]) -> str:
        body = json.dumps({"model": self.model, "messages": messages, **self.options}).encode()
        answer = self.endpoint.ask("POST", "/chat/completions", body)
        try:
            content = json.loads(answer)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise InputError(
                f"vlm_judge: {self.endpoint.url} did not answer in the form of /v1/chat/completions ({error!r})"
            ) from error
        return content if isinstance(content, str) else ""

    def _number(self, answer: str) -> float:
        """Return the score in an answer. Raise ``ValueError`` that says what is wrong with it."""
        found = final_object(answer)
        if found is None:
            raise ValueError("it does not end in a valid JSON object")
        value = found.get("score")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError("it has no number called score")
        if not self.low <= value <= self.high:
            raise ValueError(f"its score {str(value)[:20]} is not between {self.low:g} and {self.high:g}")
        return float(value)


def final_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object that ends at the last brace of a text, whatever the text says before it, even in
    braces."""
    begin, end = text.find("{"), text.rfind("}") + 1
    while 0 <= begin < end:
        try:
            return json.loads(text[begin:end])
        except (ValueError, RecursionError):
            begin = text.find("{", begin + 1)
    return None


def data_url(image: np.ndarray) -> str:
    """Write a uint8 image (H, W, 3) as a PNG in a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
