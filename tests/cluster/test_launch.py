"""Cluster files, job descriptions, and a real launch onto a cluster of two raylets."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from flowalign.cluster.errors import ClusterError
from flowalign.cluster.launch import entrypoint, launch, read_cluster_file, runtime_env
from flowalign.cluster.packed import check_hides_nothing
from tests.cluster.runs import small_config

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")
TOKEN = "a-token-of-at-least-32-characters-for-tests"


def write(path: Path, **content: object) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("name", ["local.yaml", "example.yaml"])
def test_shipped_cluster_files_are_valid(name: str) -> None:
    assert read_cluster_file(ROOT / "configs" / "cluster" / name).runs_dir.startswith("/")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"address": "http://h:1", "runs_dir": "/r", "tokenenv": "T"}, "unknown key 'tokenenv'.*mean 'token_env'"),
        ({"address": "h:1", "runs_dir": "/r"}, "address: got 'h:1'; give the dashboard's http://host:port"),
        ({"address": "http://h:1", "runs_dir": "runs"}, "runs_dir: .*give an absolute path that every node shares"),
        ({"runs_dir": "/r"}, "address: is missing; give the dashboard's http://host:port"),
        ({"address": "http://h:1", "runs_dir": "/r", "python": 3}, "python: got 3; write a text$"),
    ],
)
def test_wrong_cluster_file_names_key_and_remedy(tmp_path: Path, content: dict[str, str], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        read_cluster_file(write(tmp_path / "c.yaml", **content))


def test_job_runs_align_on_the_joined_cluster_and_the_users_overrides_win(tmp_path: Path) -> None:
    cluster = read_cluster_file(write(tmp_path / "c.yaml", address="http://h:1", runs_dir="/shared", exclude=["data/"]))
    config = write(tmp_path / "run.yaml", name="x")
    assert entrypoint(cluster, config, ["name=a b", "runs_dir=/mine"], tmp_path) == (
        "python -m flowalign.cli align run.yaml runs_dir=/shared 'name=a b' runs_dir=/mine "
        "cluster.backend=ray cluster.address=auto"
    )
    assert {".git", ".venv", "runs", "data/"} <= set(runtime_env(cluster, tmp_path)["excludes"])


def test_config_outside_of_the_packed_directory_is_refused(tmp_path: Path) -> None:
    cluster = read_cluster_file(write(tmp_path / "c.yaml", address="http://h:1", runs_dir="/shared"))
    with pytest.raises(ClusterError, match=r"lies outside of .*copy it in there"):
        entrypoint(cluster, tmp_path / "run.yaml", [], ROOT)


def test_a_file_that_would_hide_a_module_on_the_cluster_is_refused_by_name(tmp_path: Path) -> None:
    config = write(tmp_path / "run.yaml", name="x")
    file = write(tmp_path / "c.yaml", address="http://127.0.0.1:1", runs_dir="/r", exclude=["queue.py", "/wandb*"])
    for name in ("rewards.py", "queue.py", "my_reward.py", "tests.py", "json.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "statistics").mkdir()  # a folder of data
    for hidden, whose in (("json.py", "Python's own"), ("torch/__init__.py", "an installed"), ("flowalign.py", "this")):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_text("")
        with pytest.raises(ClusterError, match=f"{tmp_path}/{hidden[:5]}.* would travel .* hide {whose}.*; rename it"):
            launch(config, file, working_dir=tmp_path)
        (tmp_path / hidden).unlink()
    with pytest.raises(ClusterError, match="no Ray dashboard answers"):
        launch(config, file, working_dir=tmp_path)
    check_hides_nothing(ROOT, [])


def test_missing_token_and_absent_cluster_are_single_sentences(tmp_path: Path) -> None:
    config = write(tmp_path / "run.yaml", name="x")
    file = write(tmp_path / "c.yaml", address="http://127.0.0.1:1", runs_dir="/r", token_env="NO_SUCH_TOKEN")
    with pytest.raises(ClusterError, match="token_env: NO_SUCH_TOKEN is not set"):
        launch(config, file, working_dir=tmp_path)
    file = write(tmp_path / "c.yaml", address="http://127.0.0.1:1", runs_dir="/r")
    with pytest.raises(ClusterError, match=r"address: no Ray dashboard answers at http://127.0.0.1:1"):
        launch(config, file, working_dir=tmp_path)


def documented(kind: str) -> list[str]:
    """The `ray start` lines of docs/cluster.md, and what is exported for them, in their order."""
    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line.partition("#")[0].strip() for line in blocks[{"head": 0, "other": 1}[kind]].splitlines()]


def test_the_documented_lines_set_one_mode_of_authentication_before_every_ray_start() -> None:
    assert documented("head") == [
        "export RAY_AUTH_MODE=token",
        "(umask 077; ray get-auth-token --generate > /dev/null)",
        "ray start --head --dashboard-host 0.0.0.0",
    ]
    assert documented("other") == ["export RAY_AUTH_MODE=token", "ray start --address=HEAD:6379"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_documented_lines_start_a_cluster_that_is_joined_and_launched_on(
    tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    """As written but for ports, sizes and the dashboard's host: other clusters may run on this machine."""
    port, dashboard, client, first, second = free_ports(5)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": f"{RAY.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    scratch = Path("/tmp") / f"fd{port}"
    size = f"--num-cpus 2 --object-store-memory {200 << 20} --block"
    head = f"--port {port} --temp-dir {scratch} --dashboard-port {dashboard} --ray-client-server-port {client}"
    head = f"{head} --dashboard-agent-listen-port {first} --include-dashboard true {size}"
    lines = "\n".join(documented("head")).replace("0.0.0.0", "127.0.0.1")
    other = "\n".join(documented("other")).replace("HEAD:6379", f"127.0.0.1:{port}")
    log = (tmp_path / "cluster.log").open("w")

    def start(script: str) -> subprocess.Popen[bytes]:
        command, _, line = script.rpartition("\n")
        shell = f"set -e\n{command}\nexec {line}"
        return subprocess.Popen(["bash", "-c", shell], env=environment, stdout=log, stderr=log, cwd=tmp_path)

    started = [start(f"{lines} {head}")]
    try:
        wait_for(port, started[0])
        wait_for(dashboard, started[0])
        assert stat.S_IMODE((tmp_path / ".ray" / "auth_token").stat().st_mode) == 0o600
        started.append(start(f"{other} --dashboard-agent-listen-port {second} {size}"))
        config = small_config(tiny_pipeline_dir, tmp_path, cluster={}, iterations=1, logging={"wandb": "disabled"})
        write(tmp_path / "run.yaml", **json.loads(config.model_dump_json(exclude_defaults=True)))
        address = f"http://127.0.0.1:{dashboard}"
        write(tmp_path / "c.yaml", address=address, runs_dir=str(tmp_path / "shared"), python=sys.executable)
        flowalign = [sys.executable, "-m", "flowalign.cli"]
        joined = [*flowalign, "align", "run.yaml", f"cluster.address=127.0.0.1:{port}", "name=joined"]
        done = subprocess.run(
            joined, env={**environment, "RAY_AUTH_MODE": "token"}, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        refused = [*joined[:-1], "name=refused"]
        done = subprocess.run(refused, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and "RAY_AUTH_MODE=token" in done.stderr, done.stdout + done.stderr
        launched = [*flowalign, "launch", "run.yaml", "--cluster", "c.yaml", "name=launched"]
        done = subprocess.run(launched, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        (tmp_path / ".ray" / "auth_token").rename(tmp_path / "token")
        done = subprocess.run(launched, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and "asks for a token, and there is none here; run `ray get-auth-t" in done.stderr
        assert all(process.poll() is None for process in started), (tmp_path / "cluster.log").read_text()
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(timeout=60)
        log.close()
        shutil.rmtree(scratch, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture
def two_raylets(tmp_path: Path) -> Iterator[str]:
    """A head and a second raylet that ask for a token; yields the dashboard's address."""
    port, dashboard, client, *agents = free_ports(5)
    scratch = Path("/tmp") / f"fa{port}"  # sockets: their paths must be short
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    environment.pop("RAY_ADDRESS", None)
    size = ["--num-cpus", "1", "--object-store-memory", str(200 << 20), "--disable-usage-stats", "--block"]
    head = ["--head", "--port", str(port), "--include-dashboard", "true", "--temp-dir", str(scratch)]
    head += ["--dashboard-port", str(dashboard), "--ray-client-server-port", str(client)]
    agent_of = [["--dashboard-agent-listen-port", str(agent)] for agent in agents]
    log = (tmp_path / "raylets.log").open("w")
    first = [RAY, "start", *head, *size, *agent_of[0]]
    started = [subprocess.Popen(first, env=environment, stdout=log, stderr=log, cwd=tmp_path)]
    try:
        wait_for(port, started[0])
        wait_for(dashboard, started[0])
        join = ["--address", f"127.0.0.1:{port}"]
        second = [RAY, "start", *join, *size, *agent_of[1]]
        started.append(subprocess.Popen(second, env=environment, stdout=log, stderr=log, cwd=tmp_path))
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(timeout=60)
        log.close()
        shutil.rmtree(scratch, ignore_errors=True)


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"nothing listens on {port}")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_launch_runs_on_two_raylets_that_ask_for_a_token(
    two_raylets: str, tiny_pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three actors of half a CPU and more cannot share a raylet of one CPU, so both are used."""
    home = tmp_path / "project"
    home.mkdir()
    for package in ("flowalign", "rewards"):
        shutil.copytree(ROOT / package, home / package, ignore=shutil.ignore_patterns("__pycache__"))
    places = {"rollout_cpus": 0.6, "reward_cpus": 0.2, "learner_cpus": 0.6}
    config = small_config(tiny_pipeline_dir, home, cluster=places, logging={"wandb": "disabled"})
    content = json.loads(config.model_dump_json(exclude_defaults=True))
    content["rewards"][1]["spec"] = "reward.py:brightness"
    write(home / "run.yaml", **content)
    monkeypatch.setenv("CLUSTER_TOKEN", TOKEN)
    shared = tmp_path / "shared"
    keys = {"address": two_raylets, "runs_dir": str(shared), "python": sys.executable}
    cluster = write(home / "cluster.yaml", **keys, token_env="CLUSTER_TOKEN")
    printed: list[str] = []
    code = launch(home / "run.yaml", cluster, ["name=launched"], working_dir=home, write=printed.append)
    assert code == 0, "".join(printed)
    assert "iteration 2/2" in "".join(printed)
    assert (shared / "launched" / "checkpoints" / "latest").is_file()
    code = launch(home / "run.yaml", cluster, ["iterations=many"], working_dir=home, write=printed.append)
    assert code == 2, "".join(printed)
    monkeypatch.setenv("CLUSTER_TOKEN", TOKEN + "wrong")
    with pytest.raises(ClusterError, match="refused the token"):
        launch(home / "run.yaml", cluster, working_dir=home, write=printed.append)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("address: http://h:1\n".encode("utf-16"), "looks like UTF-16 text; save it as UTF-8"),
        ("address: http://h:1\nruns_dir: /é\n".encode("cp1252"), "line 2 is not UTF-8"),
        (b"address: http://h:1\n\truns_dir: /r\n", "line 2 is not YAML: .*indent with spaces"),
        (b"address: http://h:1\naddress: http://h:2\n", "line 2 is not YAML: the key address is given twice"),
        (b"- a\n", "holds no keys"),
    ],
)
def test_a_cluster_file_that_is_no_text_of_yaml_is_named_with_its_line(tmp_path: Path, content: bytes, said: str):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ClusterError, match=rf"^--cluster: .*c\.yaml.*{said}"):
        read_cluster_file(tmp_path / "c.yaml")
