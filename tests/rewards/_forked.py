"""Reward servers in processes of their own, forked from one that has imported what all of them import."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Forked:
    """A server that was started by ``arguments`` as `python -m rewards.serve` is, or with ``doors`` of its own.

    It is what ``subprocess.Popen`` is, as far as tests ask for that.
    """

    def __init__(
        self, arguments: list[str], *, doors: dict | None, environment: Mapping[str, str], files: int | None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rewards.serve", "PIL.Image", __name__])
        (out, its_out), (err, its_err) = context.Pipe(duplex=False), context.Pipe(duplex=False)
        given = (arguments, doors, dict(environment), files, its_out, its_err)
        self._process = context.Process(target=_serve, args=given, daemon=True)
        self._process.start()
        for end in (its_out, its_err):
            end.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(end.fileno())) for end in (out, err))
        for end in (out, err):
            end.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("rewards.serve", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        with ThreadPoolExecutor(2) as pool:
            out, err = pool.map(lambda stream: stream.read(), (self.stdout, self.stderr))
        self.wait(timeout)
        return out, err


def _serve(
    arguments: list[str],
    doors: dict | None,
    environment: dict[str, str],
    files: int | None,
    out: Connection,
    err: Connection,
) -> None:
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    out.close()
    err.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    if files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    from rewards.serve import main
    from rewards.serving.doors import Doors
    from rewards.serving.server import serve

    if doors is not None:
        serve(arguments[0], port=0, doors=Doors(**doors), announce=lambda line: print(line, flush=True))
        sys.exit(0)
    sys.argv = ["rewards.serve", *arguments]
    sys.exit(main())
