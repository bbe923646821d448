"""Counters of a reward server, in Prometheus' text format."""

from __future__ import annotations

import time
from collections import Counter as Counting
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
        self.began = time.monotonic()

    @property
    def images(self) -> int:
        """Images that were scored, 0 before they are."""
        return len(next(iter(self.scores.values()), ()))

    @property
    def seconds(self) -> float:
        """Since the request's head was read."""
        return time.monotonic() - self.began

    def done(self, scores: Mapping[str, NDArray[np.float64]]) -> None:
        self.scores = scores


class ServerMetrics:
    """Counters of one server, all labelled with the reward's name."""

    def __init__(self, name: str) -> None:
        self.registry = CollectorRegistry()

        def label(metric: type, key: str, text: str, *labels: str, **options: object):
            return metric(f"flowalign_reward_{key}", text, ["reward", *labels], registry=self.registry, **options)

        self._name = name
        self._outcomes: Counting[str] = Counting()
        self._scored = 0
        self._requests = label(Counter, "requests", "requests by outcome: ok, or the kind of the error", "outcome")
        self._images = label(Counter, "images", "images scored").labels(name)
        self._invalid = label(Counter, "invalid_scores", "scores that are NaN or infinite").labels(name)
        self._latency = label(Histogram, "request_seconds", "whole requests", buckets=_SECONDS).labels(name)
        self._scoring = label(Histogram, "batch_seconds", "calls of the scorer", buckets=_SECONDS).labels(name)
        self._sizes = label(Histogram, "batch_images", "images a call of the scorer", buckets=_IMAGES).labels(name)
        self._pending = label(Gauge, "pending_images", "images that wait or are being scored").labels(name)
        self._held = label(Gauge, "held_bytes", "bytes of requests and decoded pictures").labels(name)
        self._connections = label(Gauge, "connections", "connections").labels(name)
        self._turned_away = label(Gauge, "turned_away", "connections ended because others came").labels(name)

    def watch_pending(self, pending: Callable[[], int]) -> None:
        self._pending.set_function(pending)

    def watch_held(self, held: Callable[[], int]) -> None:
        self._held.set_function(held)

    def watch_connections(self, is_open: Callable[[], int], turned_away: Callable[[], int]) -> None:
        """Watch the connections now, and how many were ended so far because others came."""
        self._connections.set_function(is_open)
        self._turned_away.set_function(turned_away)

    def batch(self, images: int, seconds: float) -> None:
        """Count one call of the scorer."""
        self._sizes.observe(images)
        self._scoring.observe(seconds)

    @contextmanager
    def request(self) -> Iterator[Seen]:
        """Time a request and count how it ended."""
        seen = Seen()
        try:
            yield seen
        except BaseException as error:
            self._ended(seen, getattr(error, "kind", "internal"))
            raise
        self._images.inc(seen.images)
        self._invalid.inc(int(sum((~np.isfinite(values)).sum() for values in seen.scores.values())))
        self._ended(seen, "ok")

    def _ended(self, seen: Seen, outcome: str) -> None:
        self._latency.observe(seen.seconds)
        self._requests.labels(self._name, outcome).inc()
        self._outcomes[outcome] += 1
        self._scored += seen.images

    def totals(self) -> str:
        """Return one sentence on all requests so far."""
        refused = {outcome: count for outcome, count in sorted(self._outcomes.items()) if outcome != "ok"}
        causes = ", ".join(f"{count} {outcome}" for outcome, count in refused.items())
        failed = f", {sum(refused.values())} of them without scores ({causes})" if refused else ""
        total, scored = sum(self._outcomes.values()), self._scored
        return f"{total} request{'s' * (total != 1)} to score{failed}; {scored} image{'s' * (scored != 1)} scored"

    def text(self) -> bytes:
        return generate_latest(self.registry)
