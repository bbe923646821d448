"""What lies in the directory where a run is started hides none of the modules that its workers need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.runs import small_config

ROOT = Path(__file__).resolve().parents[2]
HIDING = "raise RuntimeError('the user has a file of this name')\n"
WORKER = """
import importlib, ray
from flowalign.cluster.session import RaySession, worker_env

class Worker:
    def files(self, names):
        import flowalign.cluster.actors
        return [importlib.import_module(name).__file__ for name in names]

session = RaySession(None, [], "cpu")
options = {"num_cpus": 0.1, "runtime_env": {"env_vars": worker_env(1)}}
print("\\n".join(ray.get(ray.remote(Worker).options(**options).remote().files.remote(NAMES))))
session.close()
"""


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def hiding(tmp_path: Path) -> list[str]:
    """The names of modules that the working directory has as well."""
    files, folders = (
        ("flowalign", "types", "random", "queue", "statistics", "torch", "ray"),
        ("rewards", "transformers"),
    )
    for name in (*files, "datasets"):
        (tmp_path / f"{name}.py").write_text(HIDING)
    for name in (*folders, "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(HIDING)
    return [*files, *folders]


@pytest.mark.slow
def test_modules_of_the_working_directory_hide_none_of_ours_nor_of_python_on_a_worker(
    tmp_path: Path, hiding: list[str]
) -> None:
    """``-P`` is how the command ``flowalign`` looks for modules: not in the working directory."""
    done = run(tmp_path, "-P", "-c", WORKER.replace("NAMES", repr(hiding)))
    found = done.stdout.split()
    assert done.returncode == 0 and len(found) == len(hiding), done.stdout + done.stderr
    assert not any(Path(file).is_relative_to(tmp_path) for file in found)


@pytest.mark.slow
@pytest.mark.usefixtures("hiding")
def test_a_run_ends_well_in_such_a_directory(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    config = small_config(tiny_pipeline_dir, tmp_path, cluster={}, iterations=1, logging={"wandb": "disabled"})
    content = json.loads(config.model_dump_json(exclude_defaults=True))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    done = run(tmp_path, "-P", "-m", "flowalign.cli", "align", "run.yaml", "cluster.backend=ray")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "cluster-test" / "checkpoints" / "latest").is_file()


def test_python_m_finds_our_rewards_beside_a_users_file_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(HIDING)
    listed = "import flowalign.samples.scoring, rewards; print(rewards.__path__[0])"
    done = run(tmp_path, "-c", listed)
    assert done.stdout.strip() == str(ROOT / "rewards"), done.stderr
    done = run(tmp_path, "-m", "flowalign.cli", "check-nothing")
    assert "No such command" in done.stderr


def test_a_users_rewards_that_was_imported_first_is_named(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("")
    done = run(tmp_path, "-c", "import rewards; import flowalign")
    assert f"imported from {tmp_path / 'rewards.py'} before flowalign" in done.stderr.splitlines()[-1]
