"""A vision-language model as the judge, behind any OpenAI-compatible endpoint (vLLM, SGLang, a hosted one)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rewards.http.chat import Chat, final_object
from rewards.interface import Answers, Asked, SpecError

QUESTION = (
    "Rate how well the image shows what this prompt asks for, from {low} (not at all) to {high} (in every detail).\n"
    "Prompt: {prompt}\n"
    'Answer with one JSON object and nothing else: {{"score": <number from {low} to {high}>}}'
)


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
        self.question, self.low, self.high = question, low, high
        self._check_question()
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
        with ThreadPoolExecutor(self.chat.concurrency) as pool:
            return {"vlm_judge": np.array(list(pool.map(self._judge, asked.images, asked.prompts)), np.float64)}

    def retried(self) -> dict[str, int]:
        """Return how often a question had to be sent again since the last call, by address and cause."""
        return self.chat.endpoint.retried()

    def _judge(self, image: np.ndarray, prompt: str) -> float:
        """Ask about one image (H, W, 3)."""
        score = self.chat.ask(image, self._asked(prompt), self._number, f'{{"score": {self.low:g}}}')
        return float("nan") if score is None else (score - self.low) / (self.high - self.low)

    def _asked(self, prompt: str) -> str:
        return self.question.format(prompt=prompt, low=f"{self.low:g}", high=f"{self.high:g}")

    def _number(self, answer: str) -> float:
        """Return the score in an answer. Raise ``ValueError`` that says what is wrong with it."""
        value = final_object(answer).get("score")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError("it has no number called score")
        if not self.low <= value <= self.high:
            raise ValueError(f"its score {str(value)[:20]} is not between {self.low:g} and {self.high:g}")
        return float(value)
