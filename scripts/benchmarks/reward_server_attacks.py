"""Right requests to a reward server while others hold its doors, as JSON: latency, memory, lines in its log.

    python scripts/benchmarks/reward_server_attacks.py > scripts/benchmarks/results/reward_server_attacks.json

The server may open 256 files and wants a token. A process of its own keeps 400 connections that send nothing, 900 that
send half a head, and 8 requests that hold 200 MB of a body of 255 MB back, all with the right token, and opens each
anew ``--pause`` seconds after it was closed. One client sends right requests one after the other, first alone and then
beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rewards.http.client import HttpScorer
from rewards.interface import ScorerError

TOKEN = "of-the-benchmark"
MIB = 2**20
SENT, DECLARED = 200, 255
HEAD = f"POST /score HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"


@contextmanager
def running(files: int) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    """A server that may open so many files, its address, and its log."""
    command = f"ulimit -n {files}; exec {sys.executable} -m rewards.serve jpeg --port 0 --token-env REWARD_TOKEN"
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w") as log:
        process = subprocess.Popen(
            ["bash", "-c", command],
            env={**os.environ, "REWARD_TOKEN": TOKEN},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert process.stdout is not None
        try:
            found = re.search(r"http://\S+", process.stdout.readline())
            if found is None:
                raise SystemExit("the server did not start")
            yield process, found.group(), Path(folder) / "log"
        finally:
            process.terminate()
            process.wait()


async def held(port: int, sent: bytes, size: int, opened: Counter[str], kind: str, pause_s: float) -> None:
    """A connection that sends some bytes and then waits, again and again."""
    piece = bytes(MIB)
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            opened[kind] += 1
            writer.write(sent)
            for _ in range(size // len(piece)):
                writer.write(piece)
                await writer.drain()
            await reader.read()
            writer.close()
        except OSError:
            pass
        await asyncio.sleep(pause_s)


async def attack(port: int, silent: int, half: int, bodies: int, sent: int, declared: int, pause_s: float) -> None:
    """Until SIGTERM; ``sent`` of ``declared`` MiB of each body come."""
    opened: Counter[str] = Counter()
    body = f"{HEAD}Content-Length: {declared * MIB}\r\n\r\n".encode()
    kinds = [("silent", b"", 0)] * silent + [("half", HEAD.encode(), 0)] * half + [("body", body, sent * MIB)] * bodies
    tasks = [asyncio.create_task(held(port, start, size, opened, kind, pause_s)) for kind, start, size in kinds]
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    for task in tasks:
        task.cancel()
    print(json.dumps(opened))


@contextmanager
def attacked(port: int, counts: list[int], pause_s: float, opened: dict[str, int]) -> Iterator[None]:
    """While others hold the doors; ``opened`` tells afterwards how many connections of each kind they made."""
    command = [sys.executable, __file__, "--pause", str(pause_s), "--attack", str(port), *map(str, counts)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        time.sleep(3)
        yield
    finally:
        process.terminate()
        opened.update(json.loads(process.communicate()[0] or "{}"))


def right_requests(url: str, seconds: float) -> dict[str, Any]:
    os.environ["REWARD_TOKEN"] = TOKEN
    scorer = HttpScorer(url, token_env="REWARD_TOKEN", deadline_s=30)
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    expected, latencies, errors = None, [], []
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        sent = time.monotonic()
        try:
            got = scorer.score(images, ["p"] * 4, [{}] * 4)["jpeg"].tolist()
        except ScorerError as error:
            errors.append(str(error))
        else:
            expected = expected or got
            assert got == expected
            latencies.append(time.monotonic() - sent)
        time.sleep(0.02)
    return {
        "requests": len(latencies),
        "p50_ms": round(1000 * float(np.quantile(latencies, 0.5)), 1),
        "p99_ms": round(1000 * float(np.quantile(latencies, 0.99)), 1),
        "longest_ms": round(1000 * max(latencies), 1),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "tried_again": scorer.retried(),
    }


def megabytes(pid: int, key: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="of right requests, alone and beside the others")
    parser.add_argument("--files", type=int, default=256, help="that the server may open")
    parser.add_argument("--silent", type=int, default=400)
    parser.add_argument("--half", type=int, default=900)
    parser.add_argument("--bodies", type=int, default=8)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds until a closed connection is opened anew")
    parser.add_argument("--attack", type=int, nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack:
        with contextlib.suppress(KeyboardInterrupt):
            port, silent, half, bodies, sent, declared = options.attack
            asyncio.run(attack(port, silent, half, bodies, sent, declared, options.pause))
        return
    counts, opened = [options.silent, options.half, options.bodies, SENT, DECLARED], {}
    with running(options.files) as (server, url, log):
        right_requests(url, 1)
        report: dict[str, Any] = {
            "benchmark": "reward_server_attacks",
            "machine": {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)},  # others' work, before ours
            "files": options.files,
            "pause_s": options.pause,
            "alone": right_requests(url, options.seconds),
            "megabytes_alone": megabytes(server.pid, "VmHWM"),
        }
        with attacked(int(url.rpartition(":")[2]), counts, options.pause, opened):
            report["attacked"] = right_requests(url, options.seconds)
            report["megabytes_attacked"] = megabytes(server.pid, "VmHWM")
            report["files_open"] = len(os.listdir(f"/proc/{server.pid}/fd"))
        report["connections_of_the_others"] = opened
        report["log_bytes"] = log.stat().st_size
        report["after"] = right_requests(url, 2)
        report["megabytes_after"] = megabytes(server.pid, "VmRSS")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
