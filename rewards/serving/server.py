"""A reward server: listens, loads its scorer, and serves until it is told to end."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from rewards.interface import Scorer, ScorerError, SpecError, set_up
from rewards.resolve import resolve
from rewards.serving.app import OFFERS, Rooms, create_app
from rewards.serving.batching import DEFAULT_BATCHING, Batching
from rewards.serving.doors import DEFAULT_DOORS, Door, Doors, Gate, few_lines
from rewards.serving.hosts import hosts_of, is_loopback
from rewards.serving.metrics import ServerMetrics
from rewards.serving.porch import Porch

_QUEUE = 1024  # connections that the system keeps until they are taken


class PortInUse(ScorerError):
    """The port is taken: nothing can listen there."""

    kind = "port_in_use"


def serve(
    spec: str | Mapping[str, Any],
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    base_dir: str | Path = ".",
    device: str = "cpu",
    token: str | None = None,
    batching: Batching = DEFAULT_BATCHING,
    doors: Doors = DEFAULT_DOORS,
    announce: Callable[[str], None] = print,
) -> None:
    """Serve one scorer until SIGINT or SIGTERM; port 0 takes a free one. ``announce`` gets the address once it listens.

    At the end ``announce`` gets the totals. The logger ``rewards.requests`` has a line a request, at INFO.

    Raises ``SpecError`` for a spec that does not resolve or an address beyond this machine without a
    token, ``PortInUse`` for a port that is taken.
    """
    if token is None and not is_loopback(host):
        raise SpecError(f"host {host} is reachable from outside and needs a token; name its variable with --token-env")
    with _listen(host, port) as listener:
        name, scorer = _loaded(spec, base_dir, device)
        metrics = ServerMetrics(name)
        rooms = Rooms(doors)
        gate = Gate(doors, rooms.give_way)
        app = create_app(
            name,
            scorer,
            token=token,
            batching=batching,
            metrics=metrics,
            doors=doors,
            hosts=hosts_of(host, doors.allow_hosts),
            rooms=rooms,
        )
        listener.listen(_QUEUE)
        _run(app, listener, gate, host, announce, name, metrics)


def _loaded(spec: str | Mapping[str, Any], base_dir: str | Path, device: str) -> tuple[str, Scorer]:
    """Return the name by which strangers may call the scorer, and the scorer itself, set up."""
    scorer = resolve(spec, base_dir, OFFERS)
    set_up(scorer, device)
    return public_name(spec if isinstance(spec, str) else str(spec["type"])), scorer


def _run(
    app: FastAPI,
    listener: socket.socket,
    gate: Gate,
    host: str,
    announce: Callable[[str], None],
    name: str,
    metrics: ServerMetrics,
) -> None:
    """Serve ``app`` until it is told to end; say where at the beginning, and at the end how much it scored."""
    address = f"[{host}]" if ":" in host else host
    line = f"reward server of {name} listens on http://{address}:{listener.getsockname()[1]}"
    metrics.watch_connections(lambda: gate.open, lambda: gate.turned_away)
    config = uvicorn.Config(
        app,
        http=Door,
        ws="none",
        loop="asyncio",
        log_level="error",  # a stranger's bad request is told to the stranger
        access_log=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )
    began = time.monotonic()
    try:
        with few_lines("asyncio", "uvicorn.error", "rewards.serve"):
            _Server(config, listener, gate, lambda: announce(line)).run(sockets=[])
    finally:
        announce(f"reward server of {name} ends after {time.monotonic() - began:.0f} s: {metrics.totals()}")


def public_name(spec: str) -> str:
    """Return the part of a spec that strangers may read, as a run calls it.

    For ``/a/path/file.py:reward`` this is what the file names.
    """
    location, colon, attribute = spec.rpartition(":")
    return attribute if colon and location.endswith(".py") else spec


class _Server(uvicorn.Server):
    """Takes its connections itself, and says that it listens once it can also be interrupted, not before."""

    def __init__(
        self, config: uvicorn.Config, listener: socket.socket, gate: Gate, announce: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._listener, self._gate, self._announce = listener, gate, announce
        self._porch: Porch | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End well: to be interrupted is the normal end of a server, and no error. A second Ctrl-C waits for nobody."""
        self.force_exit |= self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._porch = Porch(self._listener, self._gate, self._door)
            self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._porch is not None:
            self._porch.close()
        self._listener.close()
        await super().shutdown(sockets)

    def _door(self, heard: bytes) -> Door:
        return Door(
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            gate=self._gate,
            heard=heard,
        )


def _listen(host: str, port: int) -> socket.socket:
    # asyncio turns Nagle's delay off only where the protocol is named; a kept connection would wait 40 ms an answer.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # Two sockets may be bound to one port with SO_REUSEADDR; only one of them may listen.
        listener.listen(1)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise PortInUse(
            f"cannot listen on {host}:{port} ({reason}); choose another --port, or 0 for a free one"
        ) from error
    return listener
