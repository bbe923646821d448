"""A reward server: ``python -m rewards.serve SPEC --port 8000`` runs one scorer behind HTTP.

``POST /score`` takes and returns the bytes of ``rewards.wire``, or takes a multipart form (``images``: PNG or JPEG
files, ``prompts`` and optionally ``metadata``: JSON lists) and returns JSON. ``GET /health`` and ``GET /info`` answer
JSON, ``GET /metrics`` in Prometheus' format. Every error is JSON, ``{"error": {"type", "message"}}``, without a trace;
the trace is in the log. Requests that come together are scored together (``rewards.serving.batching``).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from rewards.interface import ScorerError, SpecError
from rewards.printable import printable, write_out_logs
from rewards.resolve import options_of
from rewards.serving.batching import Batching
from rewards.serving.doors import DEFAULT_DOORS, MIB, Doors
from rewards.serving.requestlog import log_requests
from rewards.serving.server import serve

HELD = "MiB of requests held at once, and as many of decoded pictures; more wait"


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
        spec = {**options_of(arguments.options), "type": arguments.spec}
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
