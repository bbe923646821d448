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

    def metrics(self, made: tuple[float, float, int] | None = None) -> dict[str, float]:
        """Return ``time/*``, and ``throughput/*`` where images were made.

        ``made`` has the seconds of rolling out and of scoring, means over the workers, and the number of images; None
        where nothing was rolled out, whose phases then are none.
        """
        total = time.monotonic() - self._began
        if made is None:
            return {"time/learn_s": self._laps["learn_s"], "time/iteration_s": total}
        rollout_s, score_s, num_images = made
        times = {"rollout_s": rollout_s, "score_s": score_s, **self._laps, "iteration_s": total}
        times["idle_s"] = max(0.0, self._laps["collect_s"] - rollout_s)
        return {f"time/{k}": v for k, v in times.items()} | {"throughput/images_per_s": num_images / total}
