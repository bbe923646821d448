"""Runs the ranks of the engine tests once and shares what they wrote."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ran:
    """Files and results of the ranks: ``train[rank][kind]``, ``resume[rank][kind]``."""

    folder: Path
    train: list[dict[str, Any]]
    resume: list[dict[str, Any]]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ranks_of(module: str, folder: Path, world: int, *arguments: str) -> list[str]:
    """Run ``module`` as each of ``world`` ranks, and return what they print."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONDONTWRITEBYTECODE"] = ""  # without bytecode each rank compiles torch and DeepSpeed for 10 s
    common = [str(world), str(_free_port()), *arguments]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(folder), str(rank), *common],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        output = [process.communicate(timeout=280)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert all(process.returncode == 0 for process in ranks), "\n".join(output)
    assert not any("DeepSpeed" in text or "/deepspeed" in text for text in output), "\n".join(output)
    return output


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Ran]:
    """``ran(world, kinds)``; each combination runs once a session."""
    done: dict[tuple[int, str], Ran] = {}

    def once(world: int, kinds: str) -> Ran:
        if (world, kinds) not in done:
            folder = tmp_path_factory.mktemp(f"ranks{world}_{kinds}")
            # One rank shows that a new process resumes; starting DeepSpeed twice on two costs half a minute.
            for phase in ("train", "resume") if world == 1 else ("both",):
                ranks_of("tests.engine.worker", folder, world, kinds, phase)
            results = (
                [json.loads((folder / f"{phase}_rank{rank}.json").read_text()) for rank in range(world)]
                for phase in ("train", "resume")
            )
            done[world, kinds] = Ran(folder, *results)
        return done[world, kinds]

    return once
