"""Which TCP ports the processes of a run listen on, as the kernel tells it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"


@dataclass(frozen=True)
class Door:
    """A port on which ``command``, a process of the run, listens."""

    pid: int
    command: str
    address: str
    port: int


def doors(pid: int) -> list[Door]:
    """Those of ``pid`` and of all its descendants."""
    listening = {**_sockets("tcp", socket.AF_INET), **_sockets("tcp6", socket.AF_INET6)}
    return [
        Door(process, _command(process), *listening[held])
        for process in _tree(pid)
        for held in sorted(set(_held(process)) & listening.keys())
    ]


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


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
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
