"""Pools of actors that outlive their processes, the learner's group, and errors as the workers raised them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from flowalign.cluster.errors import ClusterError, LearnerLost, WorkerLost
from flowalign.cluster.witness import DEATHS, Witness, raise_failed_import

RESTART_S = 300.0
_OTHERS_S = 2.0


@contextmanager
def as_raised() -> Iterator[None]:
    """A worker's own exception, typed and without Ray's traceback; the death of an actor passes through."""
    try:
        yield
    except RayTaskError as error:
        cause: Any = error
        while isinstance(cause, RayTaskError) and cause.cause is not cause:
            cause = cause.cause
        raise_failed_import(cause)
        if isinstance(cause, RayError) or not isinstance(cause, BaseException):
            raise ClusterError(f"a worker failed: {_first_line(cause)}") from None
        raise cause from None


def fetch(refs: Any) -> Any:
    """``ray.get`` with errors as their workers raised them."""
    with as_raised():
        return ray.get(refs)


class Pool:
    """Actors of one kind; one that dies is made again in its place by ``make(index)`` and ``revive(actor)``.

    ``deaths`` says of each that died why, in half a sentence.
    """

    def __init__(self, kind: str, size: int, make: Callable[[int], Any]) -> None:
        self.kind, self._make = kind, make
        self.actors = [make(index) for index in range(size)]
        self._witnesses = [Witness(actor) for actor in self.actors]
        self._starts = [actor.start.remote() for actor in self.actors]
        self.pids: list[int] = []
        self.revive: Callable[[Any], None] = lambda actor: None
        self.deaths: list[str] = []

    @property
    def restarts(self) -> int:
        return len(self.deaths)

    def started(self) -> None:
        """Wait until every actor has loaded what it needs."""
        pending = {ref: index for index, ref in enumerate(self._starts)}
        try:
            for witness in self._witnesses:
                witness.meet()
        except DEATHS:
            pass  # its start tells the same
        while pending:
            ref = ray.wait(list(pending), num_returns=1)[0][0]
            index = pending.pop(ref)
            try:
                fetch(ref)
            except DEATHS as error:
                why = self._witnesses[index].cause(error)
                raise ClusterError(f"a {self.kind} worker died while it started: {why}") from None
        self.pids = fetch(self._starts)

    def why(self, index: int, error: BaseException) -> str:
        """Why actor ``index`` is gone, in half a sentence."""
        return self._witnesses[index].cause(error)

    def replace(self, index: int, why: str) -> None:
        """Make actor ``index`` again; it may die again, which shows at its next call."""
        self.deaths.append(why)
        self._witnesses[index].close()
        ray.kill(self.actors[index], no_restart=True)
        actor = self.actors[index] = self._make(index)
        witness = self._witnesses[index] = Witness(actor)
        if not ray.wait([actor.__ray_ready__.remote()], timeout=RESTART_S)[0]:
            raise WorkerLost(
                f"a {self.kind} worker died ({why}) and found no place to start again within {RESTART_S:g} s; "
                "restart the run when the cluster is whole again, or with fewer workers"
            )
        try:
            witness.meet()
            self.pids[index] = fetch(actor.start.remote())
            self.revive(actor)
        except DEATHS:
            return

    def kill(self) -> None:
        for witness in self._witnesses:
            witness.close()
        for actor in self.actors:
            ray.kill(actor, no_restart=True)


class LearnerGroup:
    """The ranks of the learner. They work in step, so that the death of one is the end of all."""

    def __init__(self, ranks: int, make: Callable[[int], Any]) -> None:
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
        self.pids: list[int] = self.wait(self._starts)

    def call(self, method: str, *args: Any) -> list[Any]:
        """The same call on every rank; answers in their order."""
        return self.wait([getattr(actor, method).remote(*args) for actor in self.actors])

    def wait(self, refs: Sequence[Any]) -> list[Any]:
        pending = list(refs)
        while pending:
            done, pending = ray.wait(pending, num_returns=1)
            try:
                fetch(done)
            except DEATHS as error:
                raise self._lost(refs.index(done[0]), error) from None
            except Exception:
                # A dead rank makes the others raise in their collectives: name the death, not its echo.
                self._raise_for_deaths(refs, pending)
                raise
        return fetch(list(refs))

    def _raise_for_deaths(self, refs: Sequence[Any], pending: list[Any]) -> None:
        for ref in ray.wait(pending, num_returns=len(pending), timeout=_OTHERS_S)[0] if pending else ():
            try:
                ray.get(ref)
            except DEATHS as error:
                raise self._lost(refs.index(ref), error) from None
            except RayTaskError:
                continue

    def _lost(self, rank: int, error: BaseException) -> LearnerLost:
        return LearnerLost(
            f"the learner (rank {rank} of {len(self.actors)}) died: {self._witnesses[rank].cause(error)}; the run "
            "stops, its last checkpoint is kept and the same command continues it"
        )

    def kill(self) -> None:
        for witness in self._witnesses:
            witness.close()
        for actor in self.actors:
            ray.kill(actor, no_restart=True)


def _first_line(error: Any) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
