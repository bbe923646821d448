"""The way of the learner's weights to the rollout workers: published once, bound by each, every receipt compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from flowalign.cluster.errors import WorkerLost
from flowalign.cluster.pool import Pool, fetch
from flowalign.cluster.ranks import LearnerGroup
from flowalign.cluster.vigil import Came, Vigil
from flowalign.cluster.witness import DEATHS
from flowalign.run.sync import SyncGuard, check_receipt
from flowalign.run.workers import BindReceipt


class Delivery:
    """Brings weights from the learner's ranks to the rollout workers, also to those that are made anew.

    ``learned`` says whether the learner has changed them since they were last sent.
    """

    def __init__(
        self,
        learner: LearnerGroup,
        rollouts: Pool,
        vigil: Vigil,
        max_task_retries: int,
        say: Callable[[str], None],
    ) -> None:
        self._learner, self._rollouts, self._vigil = learner, rollouts, vigil
        self._max_task_retries, self._say = max_task_retries, say
        self._guard = SyncGuard()
        self._sent: BindReceipt | None = None
        self._weights: Any = None
        self.learned = True
        rollouts.rebind = self._bind_again

    def forget(self) -> None:
        """Begin as at the run's beginning: the learner was made again, and may go back to earlier weights."""
        self._guard, self._sent, self._weights, self.learned = SyncGuard(), None, None, True

    @property
    def version(self) -> int:
        """The version of the weights that the workers hold; -1 before the first."""
        return -1 if self._sent is None else self._sent.version

    def send(self, evaluation: bool) -> None:
        """Put the weights into the object store once; every worker binds them and says so.

        Raises:
            LearnerLost: a rank died. WorkerLost: a worker died too often over it. SyncError: one holds others.
        """
        published = [actor.publish.options(num_returns=2).remote(evaluation) for actor in self._learner.actors]
        self._sent = self._learner.wait([receipt for _, receipt in published], "publish")[0]
        self._weights = published[0][0]
        assert self._sent is not None
        self._rollouts.settle()
        receipts = self._receipts()
        self._guard.check_receipts(self._sent, receipts, self.learned, evaluation)

    def _receipts(self) -> list[BindReceipt]:
        """Return a receipt of every rollout worker.

        A worker that dies or freezes over it is made again, all of them side by side.
        """
        found: dict[int, BindReceipt] = {}
        dead: dict[int, str] = {}
        count = len(self._rollouts.actors)
        for _ in range(self._max_task_retries + 1):
            self._rollouts.replace(dead)
            asked = {self._bind(self._rollouts.actors[i]): i for i in range(count) if i not in found}
            receipts, dead = self._bound(asked)
            found |= receipts
            if not dead:
                return [found[i] for i in range(count)]
        index, why = next(iter(dead.items()))
        raise WorkerLost(f"rollout worker {index} keeps dying as it takes over weights, the last time so: {why}")

    def _bound(self, asked: Mapping[Any, int]) -> tuple[dict[int, BindReceipt], dict[int, str]]:
        """Return the receipts by worker, and the reasons why others are dead or count as dead."""
        found: dict[int, BindReceipt] = {}
        dead: dict[int, str] = {}
        waits = {ref: self._vigil.wait("weights") for ref in asked}
        for ref, came in self._vigil.each(waits):
            index, wait = asked[ref], waits[ref]
            if index in dead:
                continue
            if came is Came.SLOW:
                silent = f"{self._rollouts.name(index)} {wait.so_far()}"
                self._say(f"late: {silent}; if it goes on so it is ended and made again at {wait.end()}")
            elif came is Came.LATE:
                dead[index] = wait.why()
                self._rollouts.end(index)
            else:
                try:
                    found[index] = fetch(ref)
                    wait.answered()
                except DEATHS as error:
                    dead[index] = self._rollouts.why(index, error)
        return found, dead

    def _bind(self, actor: Any) -> Any:
        assert self._sent is not None
        return actor.bind.remote(self._weights, self._sent.version)

    def _bind_again(self, actor: Any) -> tuple[Any, Callable[[BindReceipt], None]] | None:
        """Give a rollout worker that was made anew the current weights; it acknowledges them like any other."""
        return None if self._sent is None else (self._bind(actor), partial(check_receipt, self._sent))
