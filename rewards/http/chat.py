"""Questions to a vision-language model behind an OpenAI-compatible endpoint, and answers that can be used."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from rewards.errors import InputError, SpecError
from rewards.http.transport import Endpoint, ServerRefused

KEY_REFUSED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
_CHECK_S = 4.0
Answer = TypeVar("Answer")
AGAIN = "That was not usable: {problem}. Answer with one JSON object and nothing else, such as {example}."


class Chat:
    """A model at an endpoint; ``name`` is what asks it in errors, such as a reward's.

    ``url`` is the endpoint up to ``/v1``, ``model`` the name that it serves. An answer that cannot be used is asked for
    again, ``repairs`` times, with what was wrong. ``seed`` is sent along where there is one. ``token_env`` names the
    variable that holds the key.
    """

    def __init__(
        self,
        name: str,
        url: str,
        model: str,
        *,
        repairs: int,
        temperature: float,
        max_tokens: int,
        concurrency: int,
        deadline_s: float,
        retries: int,
        token_env: str | None,
        seed: int | None = None,
    ) -> None:
        if repairs < 0 or concurrency < 1:
            raise SpecError(f"{name}: repairs must be >= 0 and concurrency >= 1")
        self.name, self.model, self.repairs, self.concurrency = name, model, repairs, concurrency
        self.options = {"temperature": temperature, "max_tokens": max_tokens} | ({} if seed is None else {"seed": seed})
        self._token_env = token_env
        self.endpoint = Endpoint(
            url,
            what=name,
            hint="start the model's server or correct the url, which ends in /v1",
            deadline_s=deadline_s,
            retries=retries,
            token_env=token_env,
        )
        self._log = logging.getLogger(f"rewards.{name}")

    def ask(self, image: np.ndarray, question: str, read: Callable[[str], Answer], example: str) -> Answer | None:
        """Ask about one image (H, W, 3) and return what ``read`` makes of the answer; None where none is usable.

        ``read`` raises ValueError that says what is wrong; ``example`` is an answer that it can use.
        """
        messages, problem = _asking(image, question), ""
        for _ in range(self.repairs + 1):
            answer, _ = self._post(messages)
            try:
                return read(answer)
            except ValueError as error:
                problem = str(error)
            again = AGAIN.format(problem=problem, example=example)
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": again}]
        self._log.warning("no usable answer after %d tries: %s; asked %r", self.repairs + 1, problem, question[-80:])
        return None

    def describe(self, image: np.ndarray, instruction: str) -> str:
        """Return what the model writes about one image (H, W, 3), asked once.

        Raises:
            InputError: its answer was cut off, or has another form. ScorerError: none came, see `Endpoint.ask`.
        """
        answer, end = self._post(_asking(image, instruction))
        if end == "length":
            raise InputError(f"{self.name}: its answer was cut off after max_tokens = {self.options['max_tokens']}")
        return answer

    def check(self) -> None:
        """Raise ScorerError where nothing answers at the address within seconds, or the key is refused."""
        endpoint = self.endpoint
        once = Endpoint(
            endpoint.url,
            what=endpoint.what,
            hint=endpoint.hint,
            deadline_s=min(endpoint.deadline_s, _CHECK_S),
            retries=0,
            token_env=self._token_env,
        )
        try:
            once.ask("GET", "/models")
        except ServerRefused as error:  # not every endpoint tells which models it serves
            if error.status in KEY_REFUSED:
                raise

    def _post(self, messages: list[dict[str, Any]]) -> tuple[str, str | None]:
        """Return an answer's text, and why it ends there."""
        body = json.dumps({"model": self.model, "messages": messages, **self.options}).encode()
        answer = self.endpoint.ask("POST", "/chat/completions", body)
        try:
            choice = json.loads(answer)["choices"][0]
            content, end = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{self.name}: {self.endpoint.url} did not answer in the form of /v1/chat/completions ({error!r})"
            ) from error
        return content if isinstance(content, str) else "", end


def _asking(image: np.ndarray, question: str) -> list[dict[str, Any]]:
    """Return the messages that ask about one image (H, W, 3)."""
    picture = {"type": "image_url", "image_url": {"url": data_url(image)}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]


def final_object(text: str) -> dict[str, Any]:
    """Return the JSON object that ends at the last brace of a text, whatever the text says before it, even in braces.

    Raises:
        ValueError: there is none.
    """
    begin, end = text.find("{"), text.rfind("}") + 1
    while 0 <= begin < end:
        try:
            return json.loads(text[begin:end])
        except (ValueError, RecursionError):
            begin = text.find("{", begin + 1)
    raise ValueError("it does not end in a valid JSON object")


def data_url(image: np.ndarray) -> str:
    """Write a uint8 image (H, W, 3) as a PNG in a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
