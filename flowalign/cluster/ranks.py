"""The learner's ranks: they work in step, so that the end of one, or its silence, is the end of all.

All of them are then made again together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayTaskError

from flowalign.cluster.errors import ClusterError, LearnerLost
from flowalign.cluster.pool import RESTART_S, Pool, fetch
from flowalign.cluster.vigil import Came, Vigil
from flowalign.cluster.witness import DEATHS, Witness
from flowalign.run.patience import Wait

_OTHERS_S, _OTHER_MACHINES_S = 2.0, 30.0  # Ray notices in so many seconds that a machine is gone
_GONE_S = 20.0
_PLACE_S = 10.0


class LearnerGroup:
    """The ranks of the learner, which ask ``teachers``.

    A teacher that does not answer either while they are late is ended instead of them, at most ``max_retries`` times in
    one call: Ray makes it again and repeats what was asked.
    """

    def __init__(self, ranks: int, make: Callable[[int], Any], vigil: Vigil, teachers: Pool, max_retries: int) -> None:
        self._vigil, self._teachers, self._max_retries = vigil, teachers, max_retries
        self._ranks, self._make = range(ranks), make
        self._make_all()

    def _make_all(self) -> None:
        self.actors = [self._make(rank) for rank in self._ranks]
        self._witnesses = [Witness(actor) for actor in self.actors]

    def restart(self) -> None:
        """End all ranks, make them again in their places and wait until they have loaded: as at the run's beginning.

        Raises:
            LearnerLost: one died meanwhile. ClusterError: a process of before does not end, or there is no place.
        """
        self._end_all()
        self._make_all()
        self._find_places()
        self.start()
        self.started()

    def _end_all(self) -> None:
        """Kill every rank and wait for its end: until then it keeps its memory, that of its GPU as well."""
        for witness, actor in zip(self._witnesses, self.actors, strict=True):
            witness.kill()
            ray.kill(actor, no_restart=True)
        there = [rank for rank, witness in enumerate(self._witnesses) if not witness.gone(_GONE_S)]
        if there:
            raise ClusterError(
                f"the learner ({self._named(there)}) cannot start again: its process was killed and is still there "
                f"after {_GONE_S:g} s, as one that waits for a disk or a GPU is"
            )
        for witness in self._witnesses:
            witness.close()

    def _find_places(self) -> None:
        """Wait until every rank has a process; where its machine is gone, Ray looks for another one."""
        pending = [actor.__ray_ready__.remote() for actor in self.actors]
        began, told = self._vigil.clock(), False
        while pending:
            found = self._vigil.step(pending)
            pending = [ref for ref in pending if ref not in found]
            waited_s = self._vigil.clock() - began
            if pending and waited_s > RESTART_S:
                raise ClusterError(
                    f"the learner found no place to start again within {RESTART_S:g} s; give the same command when the "
                    "cluster is whole again"
                )
            if pending and waited_s > _PLACE_S and not told:
                self._vigil.say(f"late: the learner waits for a place on the cluster, {RESTART_S:g} s at most")
                told = True

    def start(self) -> None:
        """Begin to load and to join each other; ``started`` waits for it."""
        for rank, witness in enumerate(self._witnesses):
            try:
                witness.meet()
            except DEATHS as error:
                raise self._lost(rank, error) from None
        addresses = self.call("address")
        (host, port), hosts = addresses[0], [other for other, _ in addresses]
        first_here = firsts(hosts)
        host = "127.0.0.1" if len(set(hosts)) == 1 else host
        self._starts = [actor.start.remote(host, port, first_here[rank]) for rank, actor in enumerate(self.actors)]

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
                    f"late: the learner ({silent}) {wait.so_far()}; if it goes on so it is ended at {wait.end()}"
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
        elsewhere = len({witness.meet().node for witness in self._witnesses}) > 1
        within_s = _OTHER_MACHINES_S if elsewhere else _OTHERS_S
        for ref in ray.wait(pending, num_returns=len(pending), timeout=within_s)[0] if pending else ():
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
        end = self._witnesses[rank].ending(error)
        return LearnerLost(f"the learner (rank {rank} of {len(self.actors)}) died: {end}", end.kind)

    def _frozen(self, silent: list[int], wait: Wait) -> LearnerLost:
        """Name a stopped process in the error.

        Without one nobody knows which of the silent ranks the others wait for.
        """
        stopped = [rank for rank in silent if self._witnesses[rank].stopped()]
        how = ", since its process is stopped" if stopped else ""
        return LearnerLost(f"the learner ({self._named(stopped or silent)}) was ended: {wait.why()}{how}", "silence")

    def _named(self, ranks: list[int]) -> str:
        return f"rank{'s' * (len(ranks) > 1)} {' and '.join(map(str, ranks))} of {len(self.actors)}"

    def kill(self) -> None:
        for witness in self._witnesses:
            witness.end()
        for actor in self.actors:
            ray.kill(actor, no_restart=True)


def _unanswered(pings: dict[int, Any]) -> list[int]:
    return [index for index, ping in pings.items() if not ray.wait([ping], timeout=0)[0]]


def firsts(hosts: Sequence[str]) -> list[bool]:
    """Tell of each rank whether it is the first on its host."""
    return [hosts.index(host) == rank for rank, host in enumerate(hosts)]
