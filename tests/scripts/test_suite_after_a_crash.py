"""A worker of the suite that dies costs one test, and the run ends."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DIES = (
    "import os, pytest\n@pytest.mark.parametrize('i', range(6))\ndef test_a(i):\n    i == 2 and os.kill(os.getpid(), 9)"
)
PASSES = "import pytest\n@pytest.mark.parametrize('i', range(5))\ndef test_b(i):\n    assert i != 3, 'bad three'"


def test_a_killed_worker_is_one_failed_test_and_every_other_runs_once(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text(
        "from tests.conftest import pytest_runtest_logreport, pytest_xdist_make_scheduler\n"
    )
    for name, text in {"a": DIES, "b": PASSES, "c": PASSES.replace("!= 3", "< 9")}.items():
        (tmp_path / f"test_{name}.py").write_text(text + "\n")
    command = "-m pytest -n 2 --dist loadfile --no-loadscope-reorder --import-mode=importlib -p no:cacheprovider"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert "2 failed, 14 passed" in done.stdout.splitlines()[-1], done.stdout + done.stderr
    at_once = done.stdout.split("= FAILURES =")[0]
    assert "FAILED in call: test_b.py::test_b[3]\nE       AssertionError: bad three" in at_once
    assert "worker 'gw" in at_once and "crashed while running 'test_a.py::test_a[2]'" in at_once
