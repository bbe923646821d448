"""Real reward servers in processes of their own, and small batches of images."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.rewards._forked import ROOT, Forked


class Server:
    """A reward server that listens and may open so many ``files``: what ``python -m rewards.serve`` does, or ``serve``
    with ``doors``. With ``fresh`` it is that command itself, which takes a second longer."""

    def __init__(
        self,
        *arguments: str,
        env: dict[str, str] | None = None,
        port: int = 0,
        files: int | None = None,
        doors: dict[str, Any] | None = None,
        fresh: bool = False,
    ) -> None:
        given, environment = [*arguments, "--port", str(port)], {**os.environ, **(env or {})}
        self.process: Forked | subprocess.Popen[str]
        if fresh:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rewards.serve", *given],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        else:
            self.process = Forked(given, doors=doors, environment=environment, files=files)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+:(\d+)", line)
        if found is None:
            self.process.wait(timeout=20)
            assert self.process.stderr is not None
            raise AssertionError(f"the server did not start: {self.process.stderr.read()}")
        self.url = found.group()
        self.port = int(found[1])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=20)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


REWARDS = """
import os, time
import numpy as np
def brightness(images, prompts, metadata):
    return images.mean(axis=(1, 2, 3))
def echo(images, prompts, metadata):
    return {"index": [float(m["i"]) for m in metadata], "length": [float(len(p)) for p in prompts]}
def broken(images, prompts, metadata):
    raise RuntimeError("secret of line one\\nline two")
def short(images, prompts, metadata):
    return [1.0]
def text(images, prompts, metadata):
    return ["good"] * len(images)
def odd(images, prompts, metadata):
    return np.array([np.nan, np.inf, -np.inf, 1e30, 0.5])
def slow(images, prompts, metadata):
    time.sleep(30)
def deadly(images, prompts, metadata):
    os._exit(9)
class Narrow:
    name, sometimes = "light", ("first",)
    def score(self, images, prompts, metadata):
        first = [1.0] + [np.nan] * (len(images) - 1)
        return {"light": images.mean(axis=(1, 2, 3)), "first": first}
"""


@pytest.fixture
def start_server() -> Iterator[Callable[..., Server]]:
    """Starts a server of this test's own, from the command line's arguments."""
    servers: list[Server] = []

    def start(*arguments: str, **options: Any) -> Server:
        servers.append(Server(*arguments, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def user_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("user") / "user_rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def serve_reward(user_file, start_server) -> Callable[..., Server]:
    """A server of this test's own, for one function of the user's file."""
    return lambda name, *arguments, **options: start_server(f"{user_file}:{name}", *arguments, **options)


@pytest.fixture(scope="session")
def shared_server(user_file) -> Iterator[Callable[[str], Server]]:
    """One server a function for the whole session, for tests that leave it as it was."""
    servers: dict[str, Server] = {}

    def get(name: str) -> Server:
        if name not in servers:
            servers[name] = Server(f"{user_file}:{name}")
        return servers[name]

    yield get
    for server in servers.values():
        server.kill()


Batch = tuple[np.ndarray, list[str], list[dict]]


@pytest.fixture
def batch() -> Batch:
    """Five random 12×10 images, their prompts and metadata."""
    images = np.random.default_rng(0).integers(0, 256, (5, 12, 10, 3), dtype=np.uint8)
    return images, [f"prompt {i} – é" for i in range(5)], [{"i": i, "nested": {"a": [1, None, "x"]}} for i in range(5)]
