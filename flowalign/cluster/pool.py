"""Pools of actors that outlive their processes, and errors as the workers raised them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from flowalign.cluster.errors import ClusterError, ObjectLost, WorkerLost
from flowalign.cluster.vigil import Came, Vigil
from flowalign.cluster.witness import DEATHS, Witness, raise_failed_import
from flowalign.run.patience import Wait

RESTART_S = 300.0


@contextmanager
def as_raised() -> Iterator[None]:
    """Raise a worker's own exception, typed and without Ray's traceback; the death of an actor passes through."""
    try:
        yield
    except (RayTaskError, ObjectLostError) as error:
        cause: Any = error
        while isinstance(cause, RayTaskError) and cause.cause is not cause:
            cause = cause.cause
        raise_failed_import(cause)
        if isinstance(cause, ObjectLostError):
            raise ObjectLost(f"a worker failed: {_first_line(cause)}", cause.object_ref_hex) from None
        if isinstance(cause, RayError) or not isinstance(cause, BaseException):
            raise ClusterError(f"a worker failed: {_first_line(cause)}") from None
        raise cause from None


def fetch(refs: Any) -> Any:
    """Call ``ray.get``, and raise errors as their workers raised them."""
    with as_raised():
        return ray.get(refs)


@dataclass
class _Revival:
    """An actor that is being made again: it has a place once ``placed`` is there, and works once its last ref is."""

    index: int
    placed: Any
    start: Any
    bound: Any
    accept: Callable[[Any], None]
    wait: Wait
    has_place: bool = False


class Pool:
    """Actors of one kind; one that dies is made again in its place by ``make(index)``.

    ``rebind(actor)``, if it answers, gives a ref to be waited for before the actor works again, and what is to be done
    with its value. ``deaths`` says of each that died why, in half a sentence. Several are made again side by side;
    ``reviving`` holds the refs that tell when each is ready.
    """

    def __init__(self, kind: str, size: int, make: Callable[[int], Any], vigil: Vigil) -> None:
        self.kind, self.vigil, self._make = kind, vigil, make
        self.actors = [make(index) for index in range(size)]
        self._witnesses = [Witness(actor) for actor in self.actors]
        self._starts = [actor.start.remote() for actor in self.actors]
        self.pids: list[int] = []
        self.rebind: Callable[[Any], tuple[Any, Callable[[Any], None]] | None] = lambda actor: None
        self.deaths: list[str] = []
        self.reviving: dict[Any, _Revival] = {}

    def started(self) -> None:
        """Wait until every actor has loaded what it needs.

        Raises:
            ClusterError: one died meanwhile, or was silent for longer than ``cluster.patience.first_s``.
        """
        waits = {ref: self.vigil.wait(f"{self.kind} start") for ref in self._starts}
        for ref, came in self.vigil.each(waits):
            index, wait = self._starts.index(ref), waits[ref]
            if came is Came.SLOW:
                self.vigil.say(
                    f"late: {self.name(index)} {wait.so_far()}; if it goes on so nothing begins at {wait.end()}"
                )
            elif came is Came.LATE:
                raise ClusterError(
                    f"a {self.kind} worker did not start within {wait.waited_s:.0f} s; look at what it loads, or raise "
                    "cluster.patience.first_s"
                )
            else:
                self._started(index, ref)
        self.pids = fetch(self._starts)

    def _started(self, index: int, ref: Any) -> None:
        try:
            self._witnesses[index].meet()
        except DEATHS:
            pass  # its start tells the same
        try:
            fetch(ref)
        except DEATHS as error:
            raise ClusterError(f"a {self.kind} worker died while it started: {self.why(index, error)}") from None

    def ask(self, method: str, *args: Any) -> Any:
        """Return the answer of the first actor, which has just started. Raise ClusterError as ``started`` does."""
        ref = getattr(self.actors[0], method).remote(*args)
        for _, came in self.vigil.each({ref: self.vigil.wait(f"{self.kind} start")}):
            if came is Came.LATE:
                raise ClusterError(f"a {self.kind} worker started and did not answer; look at what it loads")
        self._started(0, ref)
        return fetch(ref)

    def name(self, index: int) -> str:
        pid = f", process {self.pids[index]}" if index < len(self.pids) else ""
        return f"{self.kind} worker {index + 1} of {len(self.actors)}{pid}"

    def why(self, index: int, error: BaseException) -> str:
        """Say why actor ``index`` is gone, in half a sentence."""
        return self._witnesses[index].cause(error)

    def stopped(self, index: int) -> bool:
        """Tell whether the process of actor ``index`` is stopped, as by SIGSTOP."""
        return self._witnesses[index].stopped()

    @property
    def being_made(self) -> set[int]:
        """The indices of the actors that are being made again."""
        return {revival.index for revival in self.reviving.values()}

    def end(self, index: int) -> None:
        """Kill actor ``index``, which may be frozen; whatever was asked of it answers with its death."""
        self._witnesses[index].end()
        ray.kill(self.actors[index], no_restart=True)

    def remake(self, index: int, why: str) -> None:
        """End actor ``index``, dead or frozen, and begin to make it again; ``revived`` is for when it is ready."""
        self.deaths.append(why)
        self.end(index)
        actor = self.actors[index] = self._make(index)
        self._witnesses[index] = Witness(actor)
        placed, start = actor.__ray_ready__.remote(), actor.start.remote()
        bound, accept = self.rebind(actor) or (start, lambda pid: None)
        wait = self.vigil.wait(f"{self.kind} start")
        self.reviving[bound] = _Revival(index, placed, start, bound, accept, wait)

    def revived(self, ref: Any) -> int:
        """Take up the actor whose ``ref`` of ``reviving`` is there; where it died again, its next call shows it."""
        revival = self.reviving.pop(ref)
        try:
            self._witnesses[revival.index].meet()
            self.pids[revival.index] = fetch(revival.start)
            revival.accept(fetch(revival.bound))
        except DEATHS:
            pass
        return revival.index

    def look_after_revivals(self) -> None:
        """End those that are frozen while they are made again, so that they count as dead.

        Raises:
            WorkerLost: one found no place within ``RESTART_S``.
        """
        for revival in self.reviving.values():
            if not revival.has_place:
                revival.has_place = bool(ray.wait([revival.placed], timeout=0)[0])
            if not revival.has_place and revival.wait.waited_s > RESTART_S:
                raise WorkerLost(
                    f"a {self.kind} worker died ({self.deaths[-1]}) and found no place to start again within "
                    f"{RESTART_S:g} s; restart the run when the cluster is whole again, or with fewer workers"
                )
            if revival.wait.late:
                self.end(revival.index)

    def restart(self, index: int) -> None:
        """End actor ``index``, which Ray itself makes again, and wait until it works, or is late with that as well."""
        if not self._witnesses[index].end():
            ray.kill(self.actors[index], no_restart=False)
        self.deaths.append("it did not answer")
        self._witnesses[index] = Witness(self.actors[index])
        waits = {self.actors[index].start.remote(): self.vigil.wait(f"{self.kind} start")}
        for ref, came in self.vigil.each(waits):
            if came is Came.LATE:
                return
            if came is Came.ANSWER:
                self._started(index, ref)
                self.pids[index] = fetch(ref)

    def replace(self, dead: Mapping[int, str]) -> None:
        """Make dead actors again, side by side, and wait for them; ``dead`` says why each is."""
        for index, why in dead.items():
            self.remake(index, why)
        self.settle()

    def settle(self) -> None:
        """Wait until nobody is being made again."""
        while self.reviving:
            for ref in self.vigil.step(list(self.reviving)):
                self.revived(ref)
            self.look_after_revivals()

    def kill(self) -> None:
        for index in range(len(self.actors)):
            self.end(index)


def _first_line(error: Any) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
