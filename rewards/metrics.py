"""What a reward server counts, in Prometheus' text format."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Seen:
    """One request under way."""

    def __init__(self) -> None:
        self.scores: Mapping[str, NDArray[np.float64]] = {}

    def done(self, scores: Mapping[str, NDArray[np.float64]]) -> None:
        self.scores = scores


class ServerMetrics:
    """Counters of one server, all labelled with the reward's name."""

    def __init__(self, name: str) -> None:
        self.registry = CollectorRegistry()

        def label(metric: type, key: str, text: str, *labels: str, **options: object):
            return metric(f"flowalign_reward_{key}", text, ["reward", *labels], registry=self.registry, **options)

        self._name = name
        self._requests = label(Counter, "requests", "requests by outcome: ok, or the kind of the error", "outcome")
        self._images = label(Counter, "images", "images scored").labels(name)
        self._invalid = label(Counter, "invalid_scores", "scores that are NaN or infinite").labels(name)
        self._latency = label(Histogram, "request_seconds", "whole requests", buckets=_SECONDS).labels(name)
        self._scoring = label(Histogram, "batch_seconds", "calls of the scorer", buckets=_SECONDS).labels(name)
        self._sizes = label(Histogram, "batch_images", "images a call of the scorer", buckets=_IMAGES).labels(name)
        self._pending = label(Gauge, "pending_images", "images that wait or are being scored").labels(name)

    def watch_pending(self, pending: Callable[[], int]) -> None:
        self._pending.set_function(pending)

    def batch(self, images: int, seconds: float) -> None:
        """One call of the scorer."""
        self._sizes.observe(images)
        self._scoring.observe(seconds)

    @contextmanager
    def request(self) -> Iterator[Seen]:
        """Time a request and count how it ended."""
        began, seen = time.monotonic(), Seen()
        try:
            yield seen
        except BaseException as error:
            self._requests.labels(self._name, getattr(error, "kind", "internal")).inc()
            raise
        finally:
            self._latency.observe(time.monotonic() - began)
        self._requests.labels(self._name, "ok").inc()
        arrays = list(seen.scores.values())
        self._images.inc(len(arrays[0]) if arrays else 0)
        self._invalid.inc(int(sum((~np.isfinite(values)).sum() for values in arrays)))

    def text(self) -> bytes:
        return generate_latest(self.registry)
