"""wandb: refused in a sentence before a run starts, and never the end of one. Real processes and a real server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from tests.cluster.runs import small_config

KEY = "0123456789" * 4
CHECK = """
import sys
from flowalign.config.section import ConfigError
from flowalign.config.logging import LoggingConfig
from flowalign.record.mirror import check_trackers
try:
    check_trackers(LoggingConfig(wandb="online"))
except ConfigError as error:
    print(error)
"""
BREAK = """
import logging, sys
from pathlib import Path
import psutil
from flowalign.config.logging import LoggingConfig
from flowalign.record.metrics import MetricsWriter
writer = MetricsWriter(Path(sys.argv[1]), "run", LoggingConfig(wandb="offline"))
writer.write(1, {"loss": 1.0}, wall_s=0.0)
for child in psutil.Process().children(recursive=True):
    child.kill()
for iteration in range(2, 5):
    writer.write(iteration, {"loss": 1.0}, wall_s=0.0)
writer.close()
"""


class Refuses(BaseHTTPRequestHandler):
    """A server that knows nobody."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.dumps({"errors": [{"message": "permission denied"}]}).encode()
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def python(tmp_path: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process of a user who has never used wandb; WANDB_MODE as continuous integration sets it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = {**kept, "HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_MODE": "offline", **variables}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def test_online_without_a_key_ends_at_once_with_what_to_do_and_no_run_directory(
    tmp_path: Path, tiny_pipeline_dir: Path
) -> None:
    changes = {"logging": {"wandb": "online"}, "runs_dir": str(tmp_path / "runs")}
    config = small_config(tiny_pipeline_dir, tmp_path, cluster={"backend": "local"}, **changes)
    content = json.loads(config.model_dump_json(exclude_defaults=True))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    done = python(tmp_path, "-m", "flowalign.cli", "align", str(tmp_path / "run.yaml"))
    said = [line for line in done.stdout.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == 2 and len(said) <= 1  # the line that says what was asked
    assert done.stderr.startswith("error: logging.wandb: online needs a key: set WANDB_API_KEY, or run `wandb login`")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("key", "where", "said"),
    [
        ("abc", "server", "logging.wandb: online, but wandb cannot use the key: WANDB_API_KEY invalid: "),
        (KEY, "server", r"does not let us in: .*permission denied; or write logging.wandb=offline"),
        (KEY, "http://127.0.0.1:1", r"http://127.0.0.1:1 does not answer \(.*\); write logging.wandb=offline"),
    ],
)
def test_a_key_that_wandb_would_refuse_is_refused_before_a_run(
    tmp_path: Path, server: str, key: str, where: str, said: str
) -> None:
    url = server if where == "server" else where
    done = python(tmp_path, "-c", CHECK, WANDB_API_KEY=key, WANDB_BASE_URL=url)
    assert re.search(said, done.stdout), done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_the_end_of_wandbs_process_in_mid_run_is_said_once_and_ends_nothing(tmp_path: Path) -> None:
    done = python(tmp_path, "-c", BREAK, str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("metrics.jsonl goes on without it") == 1 and "Traceback" not in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
