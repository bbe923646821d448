"""Restarts of the learner in mid-run: how many, after which wait, and where they end. Free of Ray."""

from __future__ import annotations

from flowalign.config.cluster import ClusterConfig

GOOD = 10
LONGEST_WAIT_S = 300.0


class RankLost(RuntimeError):
    """A learner rank died or was silent for too long; ``kind`` is equal for two that were lost for the same reason."""

    def __init__(self, said: str, kind: str = "") -> None:
        super().__init__(said)
        self.kind = kind


class Restarts:
    """Counts the restarts of a run: ``count`` in a row, ``total`` in all; ``most`` in a row are allowed.

    ``GOOD`` iterations beyond all that failed end a row. Iterations that were done again do not count, so that a run
    which gets no further ends.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self.most, self._first_s = config.max_restarts, config.restart_wait_s
        self.count = self.total = 0
        self._failed: set[tuple[int, str]] = set()

    def wait_s(self, lost: RankLost, iteration: int) -> float:
        """Count a restart after a rank was ``lost`` in ``iteration``; return the seconds to wait before it.

        Raises:
            RankLost: there is to be none, and why.
        """
        if self._failed and iteration - max(failed for failed, _ in self._failed) >= GOOD:
            self.count, self._failed = 0, set()
        why = None
        if self.most and (iteration, lost.kind) in self._failed:
            why = f"iteration {iteration} has failed for this reason before"
        elif self.count >= self.most:
            times = f"{self.count} time{'s' * (self.count > 1)}"
            why = f"the learner was started again {times} already (cluster.max_restarts)" if self.most else ""
        if why is not None:
            raise type(lost)("; ".join(filter(None, [str(lost), why, "the run stops"])), lost.kind) from None
        self._failed.add((iteration, lost.kind))
        self.count += 1
        self.total += 1
        return min(self._first_s * 2 ** min(self.count - 1, 30), LONGEST_WAIT_S)
