"""A reward server: ``python -m rewards.serve SPEC --port 8000`` runs one scorer behind HTTP.

``POST /score`` takes and returns the bytes of ``rewards.wire``, or takes a multipart form (``images``: PNG or JPEG
files, ``prompts`` and optionally ``metadata``: JSON lists) and returns JSON. ``GET /health`` and ``GET /info`` answer
JSON, ``GET /metrics`` in Prometheus' format. Every error is JSON, ``{"error": {"type", "message"}}``, without a trace;
the trace is in the log. Requests that come together are scored together (``rewards.batching``).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from rewards.app import Rooms, create_app
from rewards.batching import DEFAULT_BATCHING, Batching
from rewards.doors import DEFAULT_DOORS, MIB, Door, Doors, Gate, few_lines
from rewards.hosts import hosts_of, is_loopback
from rewards.interface import ScorerError, SpecError, set_up
from rewards.metrics import ServerMetrics
from rewards.porch import Porch
from rewards.printable import printable, write_out_logs
from rewards.requestlog import log_requests as log_requests
from rewards.resolve import resolve
from rewards.wire import DEFAULT_LIMITS, Limits

NAMES = "a further name by which clients ask for the server"
HELD = "MiB of requests held at once, and as many of decoded pictures; more wait"
_QUEUE = 1024  # connections that the system keeps until they are taken


class PortInUse(ScorerError):
    """Nothing can listen there."""

    kind = "port_in_use"


def serve(
    spec: str | Mapping[str, Any],
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    base_dir: str | Path = ".",
    device: str = "cpu",
    token: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
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
    listener = _listen(host, port)
    with listener:
        scorer = resolve(spec, base_dir)
        set_up(scorer, device)
        name = public_name(spec if isinstance(spec, str) else str(spec["type"]))
        metrics = ServerMetrics(name)
        listener.listen(_QUEUE)
        rooms = Rooms(doors)
        gate = Gate(doors, rooms.give_way)
        metrics.watch_connections(lambda: gate.open, lambda: gate.turned_away)
        app = create_app(
            name,
            scorer,
            token=token,
            limits=limits,
            batching=batching,
            metrics=metrics,
            doors=doors,
            hosts=hosts_of(host, doors.allow_hosts),
            rooms=rooms,
        )
        address = f"[{host}]" if ":" in host else host
        line = f"reward server of {name} listens on http://{address}:{listener.getsockname()[1]}"
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
    """What strangers may read of a spec, and a run calls it: of ``/a/path/file.py:reward`` what the file names."""
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


def _spec_of(text: str, options: list[str]) -> dict[str, Any]:
    """SPEC and ``key=value`` options as one dict; values are JSON where they parse as JSON."""
    spec: dict[str, Any] = {"type": text}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise SpecError(f"option {option!r} has no value; write key=value")
        try:
            spec[key] = json.loads(value)
        except ValueError:
            spec[key] = value
    return spec


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rewards.serve", description="Serve one reward over HTTP.")
    parser.add_argument("spec", help="geneval, path/to/file.py:reward, package.module:reward, …")
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of the scorer")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--token-env", help="variable that holds the token clients must send")
    parser.add_argument("--max-batch-images", type=int, default=64, help="images of merged requests; 1 merges none")
    parser.add_argument("--max-wait-ms", type=float, default=5.0, help="how long a request waits for others")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a further name of the server"
    )
    parser.add_argument("--max-held-mib", type=int, default=DEFAULT_DOORS.held_bytes // MIB, help=HELD)
    parser.add_argument("--log-requests", action="store_true", help="a line for each request on standard error")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    write_out_logs()
    log_requests(arguments.log_requests)
    try:
        token = os.environ.get(arguments.token_env) if arguments.token_env else None
        if arguments.token_env and not token:
            raise SpecError(f"the variable {arguments.token_env} (--token-env) is empty; set it to the token")
        spec = _spec_of(arguments.spec, arguments.options)
        serve(
            spec,
            arguments.host,
            arguments.port,
            device=arguments.device,
            token=token,
            batching=Batching(max_images=arguments.max_batch_images, max_wait_s=arguments.max_wait_ms / 1000),
            doors=Doors(held_bytes=arguments.max_held_mib * MIB, allow_hosts=tuple(arguments.allow_host)),
            announce=lambda line: print(printable(line), flush=True),
        )
    except ScorerError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
