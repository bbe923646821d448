"""Asks why an actor is gone: on its own machine, where its log and the kernel's counters can be read."""

from __future__ import annotations

import importlib
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flowalign.cluster.errors import WorkerImportError
from flowalign.record.death import Birth, Ending, Watch, ending, ends_within, is_stopped, oom_kills

DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError)
_ELSEWHERE_S = 30.0
_FAILED_IMPORT = "failed to import on the worker"


class Witness:
    """Stands by one actor from its start; the actor has ``born() -> Birth``."""

    def __init__(self, actor: Any) -> None:
        self._answer = actor.born.remote()
        self._here = ray.get_runtime_context().get_node_id()
        self._birth: Birth | None = None
        self._watch: Watch | None = None
        self._kills = oom_kills()

    def meet(self) -> Birth:
        """Wait until the actor lives, and keep hold of its process.

        Raises:
            WorkerImportError: it cannot import this package, or what it was given. RayError: it died.
        """
        if self._birth is None:
            try:
                birth: Birth = ray.get(self._answer)
            except RayError as error:
                raise_failed_import(error)
                raise
            self._birth = birth
            self._watch = Watch(birth.pid) if birth.node == self._here else None
        return self._birth

    def cause(self, error: BaseException) -> str:
        """Say why it died, in half a sentence; see `ending`."""
        return str(self.ending(error))

    def ending(self, error: BaseException) -> Ending:
        """Say how it died; ``error`` is what Ray raised.

        Raises:
            WorkerImportError: that is why.
        """
        raise_failed_import(error)
        said = str(error)
        if self._birth is None:
            self._try_to_meet()
        pid = re.search(r"^\s*pid: (\d+)", said, re.MULTILINE)
        birth = self._birth
        if birth is None or (pid and int(pid[1]) != birth.pid):  # Ray made it again, or it died before it could answer
            birth = self._unmet(int(pid[1]) if pid else 0, birth)
            return ending(birth, None, said)
        if birth.node == self._here:
            return ending(birth, None if self._watch is None else self._watch.status(), said)
        return _asked_elsewhere(birth, said)

    def stopped(self) -> bool:
        """Tell whether its process is stopped; False where that cannot be seen."""
        if self._birth is None:
            self._try_to_meet()
        if self._birth is None:
            return False
        if self._birth.node == self._here:
            return is_stopped(self._birth.pid)
        try:
            return bool(_elsewhere(self._birth.node, is_stopped, self._birth.pid))
        except RayError:
            return False

    def end(self) -> bool:
        """Kill the process, a stopped one too; False where it is gone, or is not one of this machine."""
        killed = self.kill()
        self.close()
        return killed

    def kill(self) -> bool:
        """Kill as ``end`` does, and keep hold of the process, so that ``gone`` may be asked."""
        return self._watch is not None and self._watch.kill()

    def gone(self, within_s: float) -> bool:
        """Wait until the process has ended, for so long at most; True also where its machine cannot be asked."""
        if self._birth is None or self._birth.node == self._here:
            return self._watch is None or self._watch.gone(within_s)
        try:
            return bool(_elsewhere(self._birth.node, ends_within, self._birth.pid, within_s))
        except RayError:
            return True

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()

    def _try_to_meet(self) -> None:
        if ray.wait([self._answer], timeout=0)[0]:
            with suppress(RayError):
                self.meet()

    def _unmet(self, pid: int, known: Birth | None) -> Birth:
        """Say what is known of a process that never said anything: its log goes by its number."""
        folder = Path(known.log).parent if known is not None and known.log else _own_logs()
        logs = sorted(folder.glob(f"worker-*-{pid}.err")) if folder is not None and pid else []
        kills = self._kills if known is None else known.kills
        return replace(known or Birth(pid, self._here), pid=pid, log=str(logs[-1]) if logs else "", kills=kills)


def raise_failed_import(error: BaseException) -> None:
    """Raise the ImportError, as itself, that kept an actor from existing; do nothing for any other error."""
    said = str(error)
    if _FAILED_IMPORT not in said and not getattr(error, "actor_init_failed", False):
        return
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b: ", line)]
    files = [found[1] for line in lines if (found := re.match(r'File "([^"]+)", line \d+', line))]
    why = raised[-1] if raised else lines[-1]
    place = f" (in {files[-1]})" if files else ""
    raise WorkerImportError(f"a worker cannot start: {why}{place}; its Python must have what this one has") from None


def _asked_elsewhere(birth: Birth, said: str) -> Ending:
    """Return the answer of ``ending`` on the machine where the process lived."""
    try:
        return _elsewhere(birth.node, ending, birth, None, said)
    except RayError as error:
        return Ending("its machine is silent", f"its machine cannot be asked why ({type(error).__name__})")


def _elsewhere(node: str, ask: Any, *args: Any) -> Any:
    """Return the answer of a function that runs on another machine.

    Raise RayError where that machine does not answer.
    """
    where = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    task: Any = ray.remote(ask)
    task = task.options(num_cpus=0, scheduling_strategy=where, max_retries=0)
    return ray.get(task.remote(*args), timeout=_ELSEWHERE_S)


def _own_logs() -> Path | None:
    """Return the directory where Ray's processes of this machine write."""
    node = getattr(importlib.import_module("ray._private.worker"), "_global_node", None)
    return None if node is None else Path(node.get_logs_dir_path())
