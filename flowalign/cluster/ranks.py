"""The learner's ranks: they work in step, so that the end of one, or its silence, is the end of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayTaskError

from flowalign.cluster.errors import LearnerLost
from flowalign.cluster.pool import Pool, fetch
from flowalign.cluster.vigil import Came, Vigil
from flowalign.cluster.witness import DEATHS, Witness
from flowalign.run.patience import Wait

_OTHERS_S = 2.0
_KEPT = "the run stops, its last checkpoint is kept and the same command continues it"


class LearnerGroup:
    """The ranks of the learner, which ask ``teachers``.

    A teacher that does not answer either while they are late is ended instead of them, at most ``max_retries`` times in
    one call: Ray makes it again and repeats what was asked.
    """

    def __init__(self, ranks: int, make: Callable[[int], Any], vigil: Vigil, teachers: Pool, max_retries: int) -> None:
        self._vigil, self._teachers, self._max_retries = vigil, teachers, max_retries
        self.actors = [make(rank) for rank in range(ranks)]
        self._witnesses = [Witness(actor) for actor in self.actors]

    def start(self) -> None:
        """Begin to load and to join each other; ``started`` waits for it."""
        for rank, witness in enumerate(self._witnesses):
            try:
                witness.meet()
            except DEATHS as error:
                raise self._lost(rank, error) from None
        addresses = self.call("address")
        host, port = addresses[0]
        if all(other == host for other, _ in addresses):
            host = "127.0.0.1"
        self._starts = [actor.start.remote(host, port) for actor in self.actors]

    def started(self) -> None:
        self.pids: list[int] = self.wait(self._starts, "start")

    def call(self, method: str, *args: Any) -> list[Any]:
        """Make the same call on every rank, and return the answers in their order."""
        return self.wait([getattr(actor, method).remote(*args) for actor in self.actors], method)

    def wait(self, refs: Sequence[Any], work: str) -> list[Any]:
        """Wait for the ranks' answers to ``work``, and return them.

        Raises:
            LearnerLost: a rank died, or was silent for too long. What a rank itself raises.
        """
        wait = self._vigil.wait(f"learner {work}")
        pending, pings, ended = list(refs), {}, 0
        for ref, came in self._vigil.each(dict.fromkeys(refs, wait)):
            if came is Came.ANSWER:
                pending.remove(ref)
                self._take(ref, refs, pending)
            elif came is Came.SLOW:
                silent = self._named([refs.index(other) for other in pending])
                self._vigil.say(
                    f"late: the learner ({silent}) {wait.so_far()}; if it goes on so the run ends at {wait.end()}"
                )
                pings = {index: actor.born.remote() for index, actor in enumerate(self._teachers.actors)}
            elif (frozen := _unanswered(pings)) and ended < self._max_retries:
                self._end_teachers(frozen, wait)
                ended, pings = ended + 1, {}
            else:
                raise self._frozen([refs.index(other) for other in pending], wait)
        wait.answered()
        return fetch(list(refs))

    def _take(self, ref: Any, refs: Sequence[Any], pending: list[Any]) -> None:
        try:
            fetch(ref)
        except DEATHS as error:
            raise self._lost(refs.index(ref), error) from None
        except Exception:
            # A dead rank makes the others raise in their collectives: name the death, not its echo.
            self._raise_for_deaths(refs, pending)
            raise

    def _raise_for_deaths(self, refs: Sequence[Any], pending: list[Any]) -> None:
        for ref in ray.wait(pending, num_returns=len(pending), timeout=_OTHERS_S)[0] if pending else ():
            try:
                ray.get(ref)
            except DEATHS as error:
                raise self._lost(refs.index(ref), error) from None
            except RayTaskError:
                continue

    def _end_teachers(self, frozen: list[int], wait: Wait) -> None:
        for index in frozen:
            silent = f"{self._teachers.name(index)} did not answer for {wait.waited_s / 2:.0f} s"
            self._vigil.say(f"replaced: {silent}; it is made again and asked once more, with the same bits")
            self._teachers.restart(index)
        wait.again()

    def _lost(self, rank: int, error: BaseException) -> LearnerLost:
        why = self._witnesses[rank].cause(error)
        return LearnerLost(f"the learner (rank {rank} of {len(self.actors)}) died: {why}; {_KEPT}")

    def _frozen(self, silent: list[int], wait: Wait) -> LearnerLost:
        """Name a stopped process in the error.

        Without one nobody knows which of the silent ranks the others wait for.
        """
        stopped = [rank for rank in silent if self._witnesses[rank].stopped()]
        how = ", since its process is stopped" if stopped else ""
        return LearnerLost(f"the learner ({self._named(stopped or silent)}) was ended: {wait.why()}{how}; {_KEPT}")

    def _named(self, ranks: list[int]) -> str:
        return f"rank{'s' * (len(ranks) > 1)} {' and '.join(map(str, ranks))} of {len(self.actors)}"

    def kill(self) -> None:
        for witness in self._witnesses:
            witness.end()
        for actor in self.actors:
            ray.kill(actor, no_restart=True)


def _unanswered(pings: dict[int, Any]) -> list[int]:
    return [index for index, ping in pings.items() if not ray.wait([ping], timeout=0)[0]]
