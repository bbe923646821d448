"""Ranks that share a host open nothing to others; by real processes and the kernel's table of sockets."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flowalign.run.ranks import Rank

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import json, os, sys
import torch
from flowalign.engine import process_group
from tests.cluster.listening import doors

rank, world, port = map(int, sys.argv[1:])
process_group.join(rank, world, port, torch.device("cpu"))
assert process_group.largest(rank) == world - 1
print(json.dumps([door.address for door in doors(os.getpid())]))
process_group.largest(rank)  # wait for the other
"""


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ranks_that_share_a_host_listen_on_loopback_alone(world: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(world), port],
            cwd=ROOT,
            env={**kept, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        opened = [json.loads(process.communicate(timeout=120)[0]) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait(timeout=20)
    assert [set(addresses) for addresses in opened] == [{"127.0.0.1"}] * world


def test_ranks_that_torchrun_started_on_one_host_meet_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "this-host", "MASTER_PORT": "29500"}
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Rank.of_environment().host == "127.0.0.1"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert Rank.of_environment().host == "this-host"
