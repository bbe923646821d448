"""A worker that loads nothing, so that its process is there in a second, and takes orders from files."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowalign.record.death import Birth

if TYPE_CHECKING:
    from flowalign.types import Preview


class Worker:
    """``start`` waits for ``folder/go``; ``ask`` for what a teacher answers. Work begins with an order from there."""

    def __init__(self, folder: Path, teacher: Any = None) -> None:
        self.folder, self.teacher = folder, teacher

    def born(self) -> Birth:
        import ray

        return Birth.of_this_process(ray.get_runtime_context().get_node_id())

    def start(self, *address: Any) -> int:
        (self.folder / f"started-{os.getpid()}").touch()
        until = time.monotonic() + 60
        while not (self.folder / "go").exists():
            if time.monotonic() > until:
                raise TimeoutError("nobody let it go")
            time.sleep(0.02)
        return os.getpid()

    def address(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    def stop(self, who: int) -> int:
        if who in (os.getpid(), 0):
            os.kill(os.getpid(), signal.SIGSTOP)
        return os.getpid()

    def answer(self) -> str:
        return "yes"

    def ask(self) -> str:
        import ray

        return ray.get(self.teacher.answer.remote())

    def score(self, evaluation: bool, *chunks: str) -> tuple[str, float]:
        self._obey()
        return f"scores of {' and '.join(chunks)}", 0.0

    def _obey(self) -> None:
        for order in ("die 1", "die 2", "sleep", "hold", "stop"):
            try:
                (self.folder / order).unlink()
            except FileNotFoundError:
                continue
            if order.startswith("die"):
                os.kill(os.getpid(), signal.SIGKILL)
            elif order == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif order == "sleep":
                time.sleep(600)
            else:  # nothing else of this process goes on meanwhile, as in a driver's call that does not come back
                ctypes.PyDLL(None).sleep(600)


class Rollouts(Worker):
    """What it makes takes a torch, which others need not import; it is there before the first rollout is waited for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from flowalign.types import Preview

        self.preview = Preview

    def rollout(self, number: int) -> tuple[str, str, Preview]:
        self._obey()
        return (
            f"chunk {number}",
            f"trajectories of chunk {number}",
            self.preview(np.full((1, 1, 1, 3), number, np.uint8), {}),
        )
