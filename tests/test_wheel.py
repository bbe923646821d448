"""The wheel holds what the quickstart needs: built, installed without its dependencies, run outside the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from flowalign import __version__

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("flowalign", "rewards")
PARTS = (*PACKAGES, "pyproject.toml", "README.md", "LICENSE")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources, since a build leaves files beside them."""
    folder = tmp_path_factory.mktemp("sources")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, folder / part)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", "dist", "."]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    (made,) = (folder / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel, and sees the packages of this one but not this repository.

    A directory that a ``.pth`` file adds is on the path, and no ``.pth`` file of its own is read: not the one of an
    editable install either.
    """
    folder = tmp_path_factory.mktemp("elsewhere") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    own = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True)
    (Path(own.stdout.decode().strip()) / "ci.pth").write_text("\n".join(sorted(paths)) + "\n")
    # pip would take the one of this environment, which has the same version, for it.
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--ignore-installed"]
    command += ["--quiet", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "bin"


def run(program: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run([str(program), *words], cwd=cwd, env=environment, capture_output=True, text=True)


def test_every_file_of_the_packages_is_in_the_wheel_and_nothing_else(wheel: Path) -> None:
    command = ["git", "ls-files", *PACKAGES]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert held == {name for name in tracked if name}
    assert wheel.name == f"flowalign-{__version__}-py3-none-any.whl"


def test_the_quickstart_runs_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    program = installed / "flowalign"
    asked = "import flowalign, rewards; print(flowalign.__file__, rewards.__file__, sep='\\n', flush=True)\n"
    asked += "from flowalign.cli import app; app('init --shapes --to quickstart.yaml'.split(), standalone_mode=False)\n"
    asked += "app(['doctor', '--json'])"  # both in one process, since each takes seconds to import what it needs
    begun = run(installed / "python", "-c", asked, cwd=tmp_path)
    assert begun.returncode == 0, begun.stderr[-3000:]
    flowalign, rewards, *_, found = begun.stdout.splitlines()
    assert all(file.startswith(str(installed.parent)) for file in (flowalign, rewards))
    shipped = [one for one in json.loads(found)["findings"] if "shipped" in one["what"]]
    assert shipped and {one["status"] for one in shipped} == {"ok"}, found
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart.yaml"]
    small = ["iterations=1", "data.groups_per_iteration=2", "cluster.backend=local", "cluster.threads=1"]
    small += ["algorithm.num_steps=2", "algorithm.timesteps=1", "evaluation.num_samples=12", "evaluation.num_steps=2"]
    small += ["rollout.chunk_size=16", "learner.micro_batch_size=16"]
    made = run(program, "align", "quickstart.yaml", *small, cwd=tmp_path)
    assert made.returncode == 0, made.stderr[-3000:]
    folder = tmp_path / "runs" / "shapes-quickstart"
    assert (folder / "report.html").is_file() and (folder / "checkpoints" / "latest").is_file()
    exported = run(program, "export", str(folder), "--to", "aligned", cwd=tmp_path)
    assert exported.returncode == 0 and (tmp_path / "aligned" / "model_index.json").is_file(), exported.stderr[-3000:]
