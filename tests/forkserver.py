"""Ranks as forks of processes that have imported torch and DeepSpeed, which each rank alone would take 4 s for.

One such process a rank, ``python -m tests.forkserver``: no two ranks share the seed of their hashes, so what depends
on the order of a set still differs between them.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ForkServer:
    """A process that runs modules, one at a time, each in a fork of itself."""

    def __init__(self) -> None:
        self._said = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forkserver"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "", "DS_ACCELERATOR": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        atexit.register(self.kill)

    def begin(self, module: str, *arguments: str, **environment: str) -> Any:
        """Begin ``python -m module``; return its output, a file that is whole at its ``end``."""
        output = tempfile.NamedTemporaryFile("w+", errors="replace")
        asked = {"module": module, "arguments": arguments, "environment": environment, "output": output.name}
        assert self._process.stdin is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return output

    def end(self) -> int:
        """Wait for what was begun, and return its exit code."""
        assert self._process.stdout is not None
        return int(self._process.stdout.readline() or "-9")

    def said(self) -> str:
        """What imports alone have printed."""
        self._said.seek(0)
        return self._said.read()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@cache
def _server(rank: int) -> ForkServer:
    return ForkServer()


def ranks_of(module: str, folder: Path, world: int, *arguments: str) -> list[str]:
    """Run ``python -m module DIR RANK WORLD PORT …`` as each of ``world`` ranks, and return what they print."""
    servers, port = [_server(rank) for rank in range(world)], str(free_port())
    try:
        output = [
            server.begin(module, str(folder), str(rank), str(world), port, *arguments, GLOO_SOCKET_IFNAME="lo")
            for rank, server in enumerate(servers)
        ]
        codes = [server.end() for server in servers]
    except BaseException:  # as where the time of a test is over
        for server in servers:
            server.kill()
        _server.cache_clear()
        raise
    texts = [server.said() + file.read() for server, file in zip(servers, output, strict=True)]
    assert not any(codes), "\n".join(texts)
    return texts


def _run(asked: dict[str, Any]) -> int:
    """The exit code of a module that is run in this process."""
    code = 0
    try:
        os.environ.update(asked["environment"])
        sys.argv = [asked["module"], *asked["arguments"]]
        runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


def _serve() -> None:
    import torch

    import flowalign.engine.zero
    from tests.engine.worker import forbid_programs

    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    forbid_programs()
    flowalign.engine.zero._quiet_deepspeed(torch.device("cpu"))
    import torch._inductor.compile_fx

    import tests.algorithms.rank  # noqa: F401

    gc.collect()
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lack the threads of this process"
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
            file = os.open(asked["output"], os.O_WRONLY | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os._exit(_run(asked))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
