"""Concurrent requests as one model batch: what makes one GPU serve many small callers.

Requests wait at most ``max_wait_s`` for company, are joined with others of the same image size up to ``max_images``,
and each caller gets its own rows back. A batch that fails is scored again request by request, so that one caller's bad
metadata fails nobody else.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rewards.interface import Asked, ScorerError
from rewards.question import joined

Scored = dict[str, NDArray[np.float64]]
Score = Callable[[Asked], Scored]


@dataclass(frozen=True)
class Batching:
    """Images in a model batch, seconds a request waits for company, images that may wait in all."""

    max_images: int = 64
    max_wait_s: float = 0.005
    max_pending: int = 4096


DEFAULT_BATCHING = Batching()


class Overloaded(ScorerError):
    """More images are waiting than the server holds; a later try may succeed."""

    kind = "overloaded"


class Stopping(ScorerError):
    """The server is on its way down and takes nothing more."""

    kind = "stopping"


@dataclass
class _Request:
    asked: Asked
    answer: Future[Scored] = field(default_factory=Future)

    @property
    def size(self) -> tuple[int, ...]:
        return self.asked.images.shape[1:]


class Merger:
    """Runs ``score`` on its own thread, one batch at a time; ``observe(images, seconds)`` is told of each batch."""

    def __init__(
        self,
        score: Score,
        *,
        batching: Batching = DEFAULT_BATCHING,
        observe: Callable[[int, float], None] = lambda images, seconds: None,
    ) -> None:
        self._score, self._observe = score, observe
        self.batching = batching
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._held: list[_Request] = []
        self._lock = threading.Lock()
        self._pending = 0
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="reward-batches", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Images that wait or are being scored."""
        return self._pending

    def submit(self, asked: Asked) -> Future[Scored]:
        """Return the future scores of a request, arrays (N,) by reward name; ends in whatever ``score`` raises.

        Raises:
            Overloaded: more than ``max_pending`` images would wait.
            Stopping: the server is going down.
        """
        request = _Request(asked)
        with self._lock:
            if self._stopped:
                raise Stopping("the reward server is stopping; send the batch again")
            if self._pending and self._pending + len(asked) > self.batching.max_pending:
                raise Overloaded(
                    f"{self._pending} images are waiting, limit {self.batching.max_pending}; send again later"
                )
            self._pending += len(asked)
            self._queue.put(request)
        return request.answer

    def close(self, timeout_s: float = 5.0) -> None:
        """Finish what was taken, then end the thread."""
        with self._lock:
            self._stopped = True
            self._queue.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            count = sum(len(request.asked) for request in batch)
            # Who waits no longer is not answered: a cancelled future would refuse the answer.
            if wanted := [request for request in batch if request.answer.set_running_or_notify_cancel()]:
                began = time.monotonic()
                self._answer(wanted)
                self._observe(sum(len(request.asked) for request in wanted), time.monotonic() - began)
            with self._lock:
                self._pending -= count

    def _next(self) -> list[_Request] | None:
        """Return the oldest request and those of its size that come in time; None when the end was asked for."""
        first = self._held.pop(0) if self._held else self._queue.get()
        if first is None:
            return None
        batch, room = [first], self.batching.max_images - len(first.asked)
        for request in [held for held in self._held if held.size == first.size and len(held.asked) <= room]:
            if len(request.asked) <= room:
                self._held.remove(request)
                batch.append(request)
                room -= len(request.asked)
        until = time.monotonic() + self.batching.max_wait_s
        while room > 0:
            try:
                request = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if request is None:
                self._queue.put(None)
                break
            if request.size != first.size or len(request.asked) > room:
                self._held.append(request)
                break
            batch.append(request)
            room -= len(request.asked)
        return batch

    def _answer(self, batch: list[_Request]) -> None:
        try:
            scored = self._score(joined([request.asked for request in batch]))
        except BaseException as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
                return
            for request in batch:
                self._answer([request])
            return
        start = 0
        for request in batch:
            rows = slice(start, start + len(request.asked))
            request.answer.set_result({name: values[rows] for name, values in scored.items()})
            start = rows.stop
