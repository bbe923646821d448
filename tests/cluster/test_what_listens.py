"""What whole runs and servers open, from their first second to their last, by the kernel's table of sockets."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from flowalign.config.sections import ModelConfig
from flowalign.making.shapes_latents import make_bank
from flowalign.models.build import load_encoders
from tests.cluster.listening import Door, asks_for_token, documented, documented_of_clusters, doors, name
from tests.cluster.runs import small_config
from tests.cluster.test_launch import RAY, TOKEN, free_ports, wait_for
from tests.run.test_pretrain_variants import config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ranks", "engine"), [(1, "deepspeed"), (2, "fsdp")])
def test_a_run_opens_nothing_but_loopback_from_its_start_to_its_end_and_leaves_no_token(
    tiny_pipeline_dir: Path, tmp_path: Path, ranks: int, engine: str
) -> None:
    """With the umask and the mode of authentication under which Ray would leave a token that everybody may read."""
    learner = {"engine": engine, "micro_batch_size": 4, "ranks": ranks}
    config = small_config(tiny_pipeline_dir, tmp_path, cluster={}, learner=learner, iterations=2)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(json.loads(config.model_dump_json(exclude_defaults=True))))
    (tmp_path / "home").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GLOO_", "NCCL_"))}
    environment = {**kept, "HOME": str(tmp_path / "home"), "RAY_AUTH_MODE": "token", "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    log = tmp_path / "log"
    with log.open("w") as output:
        run = subprocess.Popen(
            [sys.executable, "-m", "flowalign.cli", "align", "run.yaml"],
            cwd=tmp_path,
            env=environment,
            stdout=output,
            stderr=output,
            umask=0o022,
        )
        opened = set()
        while run.poll() is None:
            opened |= set(doors(run.pid))
            time.sleep(0.3)
    assert run.returncode == 0, log.read_text()
    assert {door.address for door in opened} == {"127.0.0.1"}, opened
    learners = [door for door in opened if "ray::LearnerActor" in door.command]
    assert len({door.pid for door in learners}) == ranks and len({door.port for door in learners}) >= 2 * ranks
    assert {name(door, run.pid) for door in opened} <= {row[0].split("`")[1] for row in documented()}
    assert not (tmp_path / "home" / ".ray" / "auth_token").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_of_torchrun_open_nothing_but_loopback_and_its_agent_what_is_documented(
    tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    make_bank(load_encoders(ModelConfig(path=str(tiny_pipeline_dir))), tmp_path / "bank", num_images=40, batch=20)
    learner = {"micro_batch_size": 4, "engine": "deepspeed"}
    training = config(tmp_path / "runs", tiny_pipeline_dir, tmp_path / "bank", learner=learner)
    (tmp_path / "run.yaml").write_text(training.model_dump_json())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    log = tmp_path / "log"
    with log.open("w") as output:
        agent = subprocess.Popen(
            [*torchrun, "-m", "flowalign.cli", "pretrain", "run.yaml"],
            cwd=tmp_path,
            env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=output,
        )
        opened = set()
        while agent.poll() is None:
            opened |= set(doors(agent.pid))
            time.sleep(0.1)
    assert agent.returncode == 0, log.read_text()
    ranks = {door for door in opened if "torch.distributed.run" not in door.command}
    assert {door.address for door in ranks} == {"127.0.0.1"}, ranks
    assert len({door.pid for door in ranks}) == 2
    safety = " ".join((ROOT / "docs" / "safety.md").read_text(encoding="utf-8").split())
    documented_agent = re.search(r"The agent of `torchrun` listens .* on every interface", safety)
    assert documented_agent and {door.address for door in opened - ranks} <= {"::", "0.0.0.0"}, opened - ranks


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_head_that_is_started_by_hand_opens_what_is_documented_of_clusters(tmp_path: Path) -> None:
    """With free ports in the place of those that are documented: other clusters may run on this machine."""
    ports = dict(zip((6379, 8265, 10001, 52365), free_ports(4), strict=True))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    scratch = Path("/tmp") / f"fh{ports[6379]}"  # sockets: their paths must be short
    line = f"start --head --port {ports[6379]} --dashboard-port {ports[8265]} --dashboard-host 127.0.0.1 "
    line += f"--ray-client-server-port {ports[10001]} --dashboard-agent-listen-port {ports[52365]} --block "
    line += f"--temp-dir {scratch} --include-dashboard true --num-cpus 1 --object-store-memory {200 << 20}"
    with (tmp_path / "log").open("w") as log:
        head = subprocess.Popen([RAY, *line.split()], env=environment, stdout=log, stderr=log, cwd=tmp_path)
    try:
        for port in ports.values():
            wait_for(port, head)
        opened: dict[int, Door] = {}
        for _ in range(20):
            opened |= {door.port: door for door in doors(head.pid)}
            time.sleep(0.5)
        local = {
            port: "127.0.0.1" if door.address in ("0.0.0.0", "::") else door.address for port, door in opened.items()
        }
        asking = {port for port, host in local.items() if asks_for_token(port, host)}
        counting = {port for port in opened if port not in asking and counts(port)}
    finally:
        started = {door.pid for door in doors(head.pid)}
        head.terminate()
        head.wait(timeout=90)
        for pid in started:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(scratch, ignore_errors=True)
    rows = {row[0]: row[1:] for row in documented_of_clusters()}
    said = [(name(door, -1), door.address, port, port in asking, port in counting) for port, door in opened.items()]
    seen = "\n".join(map(str, said))
    known = {name.strip("`") for row in rows for name in row.replace(" (the head's)", "").split(", ")}
    gcs, dashboard, client, agent = (opened[port] for port in ports.values())
    assert all(any(str(port) in row[0] for row in rows.values()) for port in ports), rows
    assert name(gcs, -1) == "gcs_server" and gcs.port in asking and gcs.address in ("0.0.0.0", "::"), seen
    assert name(dashboard, -1) == "dashboard" and dashboard.address == "127.0.0.1", seen
    node = gcs.command.partition("--node-ip-address=")[2].partition(" ")[0]  # by which the cluster knows the machine
    assert {client.address, agent.address} <= {"127.0.0.1", node}, seen
    rest = set(opened) - {dashboard.port}
    assert rest == asking | counting and counting, seen
    assert {"gcs_server", "raylet", "dashboard"} <= known & {row[0] for row in said}, seen


def counts(port: int) -> bool:
    """Whether anybody can read counters there."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return b"# HELP" in answer.read()
    except (OSError, http.client.HTTPException):
        return False


def test_a_reward_server_opens_one_port_on_loopback(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def bright(images, prompts, metadata):\n    return images.mean(axis=(1, 2, 3))\n"
    )
    command = [sys.executable, "-m", "flowalign.cli", "serve-reward", "mine.py:bright", "--port", "0"]
    server = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None and "http://127.0.0.1:" in server.stdout.readline()
        assert [door.address for door in doors(server.pid)] == ["127.0.0.1"]
    finally:
        server.terminate()
        server.communicate(timeout=30)
    assert next(row for row in documented() if "serve-reward" in row[0])[2].startswith("127.0.0.1")
