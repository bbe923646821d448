"""Wall time of an iteration, by its phases."""

from __future__ import annotations

import time


class Clock:
    """Wall time of an iteration's phases; idle is the time of a collection in which no rollout worker worked."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._laps[name] = now - self._last
        self._last = now

    def metrics(self, rollout_s: float, score_s: float, num_images: int | None = None) -> dict[str, float]:
        """Return ``time/*``, and ``throughput/*`` where images were made; seconds of work are means over workers."""
        total = time.monotonic() - self._began
        times = {"rollout_s": rollout_s, "score_s": score_s, **self._laps, "iteration_s": total}
        times["idle_s"] = max(0.0, self._laps["collect_s"] - rollout_s)
        speed = {} if num_images is None else {"throughput/images_per_s": num_images / total}
        return {f"time/{k}": v for k, v in times.items()} | speed
