"""The parts of an iteration's work by name: `span` marks them where the work is done, `watching` adds up their seconds.

Nothing is measured, and a span costs a call, while nobody watches.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

REST, OUTSIDE = "rest", "outside"  # what no span within a phase says; what lies in no phase, waiting included


class Watch:
    """The seconds of each part: ``seconds["learn", "backward"]`` those in which nothing within it was at work.

    The outermost span is the phase, the innermost the part. One thread is watched, the one that began. On a GPU each
    edge of a span waits for the device, so that its seconds are those of the work and not of its launch.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.began = self._last = time.perf_counter()
        self._open: list[str] = []
        self._thread = threading.get_ident()

    def span(self, name: str) -> AbstractContextManager[None]:
        return self._within(name) if threading.get_ident() == self._thread else nullcontext()

    @contextmanager
    def _within(self, name: str) -> Iterator[None]:
        self._lap()
        self._open.append(name)
        with torch.profiler.record_function(name):
            try:
                yield
            finally:
                self._lap()
                self._open.pop()

    def _lap(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        phase = self._open[0] if self._open else OUTSIDE
        self.seconds[phase, self._open[-1] if len(self._open) > 1 else REST] += now - self._last
        self._last = now

    def end(self) -> None:
        """Count the seconds up to now."""
        self._lap()


_watches: list[Watch] = []


def span(name: str) -> AbstractContextManager[None]:
    """Mark what is done inside as the part ``name``, for whoever is watching this process."""
    return _watches[-1].span(name) if _watches else nullcontext()


@contextmanager
def watching() -> Iterator[Watch]:
    """Yield a `Watch` of this thread's spans inside."""
    watch = Watch()
    _watches.append(watch)
    try:
        yield watch
    finally:
        watch.end()
        _watches.remove(watch)
