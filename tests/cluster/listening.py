"""Which TCP ports the processes of a run listen on, as the kernel tells it."""

from __future__ import annotations

import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path

import grpc

_LISTEN = "0A"
_QUESTIONS = (
    "NodeInfoGcsService/GetClusterId",
    "NodeManagerService/GetNodeStats",
    "ObjectManagerService/Pull",
    "CoreWorkerService/GetCoreWorkerStats",
    "LogService/ListLogs",
    "RayletDriver/ClusterInfo",
)


@dataclass(frozen=True)
class Door:
    """A port on which ``command``, a process of the run, listens."""

    pid: int
    command: str
    address: str
    port: int


def doors(pid: int) -> list[Door]:
    """Those of ``pid`` and of all its descendants. A process that was just forked holds what its parent opened."""
    listening = {**_sockets("tcp", socket.AF_INET), **_sockets("tcp6", socket.AF_INET6)}
    found: dict[str, Door] = {}
    for process in _tree(pid):
        if (command := _command(process)) is not None:
            for held in sorted(set(_held(process)) & listening.keys()):
                found.setdefault(held, Door(process, command, *listening[held]))
    return list(found.values())


def _tree(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            status = Path("/proc", name, "stat").read_text(encoding="utf-8", errors="replace")
            children.setdefault(int(status.rpartition(")")[2].split()[1]), []).append(int(name))
    found = [pid]
    for process in found:
        found += children.get(process, [])
    return found


def _command(pid: int) -> str | None:
    """Its words; none of a process that has ended meanwhile, which lists none either."""
    for _ in range(20):
        try:
            words = Path("/proc", str(pid), "cmdline").read_bytes()
            state = Path("/proc", str(pid), "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        except OSError:
            return None
        if words or state == "Z":
            return words.replace(b"\0", b" ").decode(errors="replace").strip() or None
        time.sleep(0.05)  # between two programs it has no words for a moment
    return ""


def _held(pid: int) -> Iterator[str]:
    with suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{number}")
                if target.startswith("socket:["):
                    yield target[len("socket:[") : -1]


def _sockets(table: str, family: socket.AddressFamily) -> dict[str, tuple[str, int]]:
    """Address and port by inode; the kernel writes addresses as words in the machine's order, here little-endian."""
    found = {}
    for line in Path("/proc/net", table).read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        if fields[3] == _LISTEN:
            packed, _, port = fields[1].partition(":")
            words = bytes.fromhex(packed)
            address = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
            found[fields[9]] = socket.inet_ntop(family, address).removeprefix("::ffff:"), int(port, 16)
    return found


def documented() -> list[list[str]]:
    """The rows of docs/safety.md's first table of what listens: process, what, address, who may ask."""
    return _rows("| process | listens |")


def documented_of_clusters() -> list[list[str]]:
    """The rows of its table of clusters that are started by hand: process, port, who may ask."""
    return _rows("| process | port |")


def _rows(head: str) -> list[list[str]]:
    text = (Path(__file__).resolve().parents[2] / "docs" / "safety.md").read_text(encoding="utf-8")
    rows = text.partition("# What listens where")[2].partition(head)[2].partition("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()[2:]]


def name(door: Door, run: int) -> str:
    """What the table calls the process; ``run`` is the one that was started as a command."""
    if door.pid == run:
        return "flowalign align"
    for known in ("gcs_server", "raylet", "monitor", "dashboard"):
        if re.search(rf"/{known}(\.py)?( |$)", door.command):
            return known
    title = door.command.split()[0] if door.command else "a process without a name"
    return title if title in ("ray::DashboardAgent", "ray::RuntimeEnvAgent") or "::" not in title else "ray::"


def asks_for_token(port: int, host: str = "127.0.0.1") -> bool:
    """Whether one of Ray's ports turns somebody away who has no token."""
    try:
        urllib.request.urlopen(f"http://{host}:{port}/", timeout=5).close()
    except urllib.error.HTTPError as error:
        return error.code == HTTPStatus.UNAUTHORIZED
    except (OSError, HTTPException):
        return any(_refused(port, host, question) for question in _QUESTIONS)
    return False


def _refused(port: int, host: str, question: str) -> bool:
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            channel.unary_unary(f"/ray.rpc.{question}")(b"", timeout=5)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
    return False
