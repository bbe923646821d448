"""Rewards in a process and environment of their own, on a real Ray; and rewards that never come back."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from flowalign.cluster.actors import HostedScorer
from flowalign.cluster.environment import announcements, folder_of, packages_of, python_with
from flowalign.cluster.ray_backend import RayBackend
from flowalign.cluster.session import RaySession
from flowalign.config.alignment import AlignConfig
from flowalign.config.sections import RewardConfig
from flowalign.run.fixed import build_run
from flowalign.run.local import LocalBackend
from flowalign.samples.offers import TRAINING
from flowalign.samples.scoring import ScorerHangs, bounded, load_scorer, score_images
from rewards.interface import Asked, Checked, ScorerFailed, SpecError
from tests.cluster.runs import small_config

ROOT = Path(__file__).resolve().parents[2]
OWN_LIBRARY = "SCALE = 3.0\n"
REWARD = """
import os, time
import numpy as np

def tripled(images, prompts, metadata):
    from only_there import SCALE
    return images.mean((1, 2, 3)) / 255 * SCALE + float(os.environ["SHIFT"])

def deadly(images, prompts, metadata):
    os.kill(os.getpid(), 9)

def asleep(images, prompts, metadata):
    time.sleep(600)

class Narrow:
    name, sometimes = "light", ("first",)
    def score(self, images, prompts, metadata):
        first = [1.0] + [np.nan] * (len(images) - 1)
        return {"light": images.mean((1, 2, 3)), "first": first}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "library" / "only_there").mkdir(parents=True)
    (tmp_path / "library" / "only_there" / "__init__.py").write_text(OWN_LIBRARY)
    (tmp_path / "own.py").write_text(REWARD)
    return tmp_path


def config_of(pipeline: Path, folder: Path, reward: dict[str, Any], **cluster: Any) -> AlignConfig:
    named = {"spec": f"{folder / 'own.py'}:{reward.pop('name')}", **reward}
    return small_config(pipeline, folder, rewards=[named], cluster=cluster)


def collect(make: Callable[[AlignConfig, Path], Any], config: AlignConfig, folder: Path) -> Any:
    backend = make(config, folder)
    try:
        run = build_run(config)
        backend.sync()
        return backend.collect(run.sampler.batch(0), run.algorithm.plan(0, run.seed), seed=run.seed)
    finally:
        backend.close()
        assert not ray.is_initialized()


def test_a_reward_runs_with_the_packages_and_variables_of_its_own_environment(
    tiny_pipeline_dir: Path, folder: Path
) -> None:
    path = os.pathsep.join(filter(None, [str(folder / "library"), os.environ.get("PYTHONPATH")]))
    environment = {"env_vars": {"SHIFT": "10", "PYTHONPATH": path}}
    config = config_of(tiny_pipeline_dir, folder, {"name": "tripled", "runtime_env": environment})
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    named = RewardConfig(spec=f"{folder / 'own.py'}:Narrow", name="mine", runtime_env=environment)
    session = RaySession(None, [], "cpu")
    try:
        hosted = HostedScorer(config.rewards[0], TRAINING, folder, config)
        scores = hosted.score(images, ["a"] * 4, [{}] * 4)
        narrow = load_scorer(named, folder, hosted=partial(HostedScorer, base_dir=folder, config=config))
        checked = score_images(narrow, Asked(images, ["a"] * 4, [{}] * 4))
    finally:
        session.close()
    # Another process changes neither which score is the main one nor which ones need not apply.
    assert list(checked.scores) == ["mine", "first"] and checked.causes == {"mine": {}, "first": {}}
    assert checked.narrowed["first"].tolist() == [True, False, False, False]
    np.testing.assert_allclose(scores["tripled"], 10 + 3 * images.mean((1, 2, 3)) / 255, rtol=1e-6)
    with pytest.raises(ModuleNotFoundError):
        __import__("only_there")


def wheel(folder: Path, version: str) -> Path:
    """A package of one module, as pip installs it without a network."""
    file, facts = folder / f"only_wheel-{version}-py3-none-any.whl", f"only_wheel-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("only_wheel.py", f"VERSION = {version!r}\n")
        made.writestr(f"{facts}/METADATA", f"Metadata-Version: 2.1\nName: only-wheel\nVersion: {version}\n")
        made.writestr(
            f"{facts}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        made.writestr(f"{facts}/RECORD", "")
    return file


@pytest.mark.slow
def test_packages_of_a_reward_are_installed_once_beside_ours_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    packages = packages_of({"pip": [str(wheel(tmp_path, "1.0")), "numpy"]})
    assert packages is not None
    reward = RewardConfig(spec="ocr", runtime_env={"pip": packages})
    assert "is installed, where later runs find it, into" in "".join(announcements([reward, reward]))
    python = python_with("ocr", packages)
    asked = "import numpy, torch, only_wheel, pip; print(only_wheel.VERSION, numpy.__file__)"
    said = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.split()
    assert said == ["1.0", np.__file__]
    held = sum(file.stat().st_size for file in folder_of(packages).rglob("*") if not file.is_symlink())
    assert held < 1_000_000  # Ray would copy all of ours
    Path(packages[0]).touch()
    assert "is installed" in next(announcements([reward]))
    packages = [str(wheel(tmp_path, "2.0"))]
    assert python_with("ocr", packages) == python_with("ocr", packages) != python
    assert "was installed before" in next(announcements([RewardConfig(spec="ocr", runtime_env={"pip": packages})]))
    with pytest.raises(
        SpecError, match=r"^reward 'ocr': the packages of its runtime_env cannot be installed into .*no_"
    ):
        python_with("ocr", [str(tmp_path / "no_such.whl")])
    assert packages_of({"pip": {"packages": ["a"], "pip_check": True}}) is None  # Ray's own business


def installs(folder: Path, packages: list[str]) -> subprocess.Popen[bytes]:
    """A process that installs ``packages``, in a moment at which pip is at it, and is stopped."""
    script = f"from flowalign.cluster.environment import python_with; python_with('ocr', {packages!r})"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        with suppress(OSError):  # one that has just ended
            for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                if "pip" in Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0"):
                    os.kill(int(child), signal.SIGSTOP)
                    (folder / "pip").write_text(child)
                    return process
        time.sleep(0.005)
    raise AssertionError("nobody called pip")


@pytest.mark.slow
@pytest.mark.fault
def test_after_a_killed_installation_and_after_the_documented_cleaning_packages_are_installed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    packages = [str(wheel(tmp_path, "1.0"))]
    process = installs(tmp_path, packages)
    process.kill()
    process.wait()
    lock = folder_of(packages).with_suffix(".lock")
    with lock.open() as held, pytest.raises(BlockingIOError):  # pip is still there: nobody installs beside it
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(int((tmp_path / "pip").read_text()), signal.SIGCONT)
    reward = RewardConfig(spec="ocr", runtime_env={"pip": packages})
    assert "is installed" in next(announcements([reward]))
    version = ["-c", "import only_wheel; print(only_wheel.VERSION)"]
    assert subprocess.check_output([python_with("ocr", packages), *version], text=True) == "1.0\n"
    assert "was installed before" in next(announcements([reward]))
    cleaning = re.findall(r"`(rm -r [^`]*)`", (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8"))
    subprocess.run(["bash", "-c", cleaning[0]], check=True)
    assert len(cleaning) == 1 and not folder_of(packages).parent.exists()
    assert "is installed" in next(announcements([reward]))
    assert subprocess.check_output([python_with("ocr", packages), *version], text=True) == "1.0\n"


@pytest.mark.slow
def test_a_reward_runs_with_the_packages_that_were_installed_for_it(
    tiny_pipeline_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    (folder / "own.py").write_text(
        "import only_wheel\n\ndef versioned(images, prompts, metadata):\n"
        "    return [float(only_wheel.VERSION)] * len(images)\n"
    )
    reward = {"name": "versioned", "runtime_env": {"pip": [str(wheel(folder, "3.0"))]}}
    said: list[str] = []
    config = config_of(tiny_pipeline_dir, folder, reward)
    collected = collect(lambda config, base: RayBackend(config, base, said.append), config, folder)
    assert collected.scores.total.eq(3).all()
    assert any("is installed, where later runs find it, into" in line for line in said), said


@pytest.mark.slow
def test_an_environment_that_ray_refuses_is_named(tiny_pipeline_dir: Path, folder: Path) -> None:
    reward = {"name": "tripled", "runtime_env": {"py_modules": [str(folder / "library" / "only_there")]}}
    with pytest.raises(SpecError, match="reward 'tripled': Ray refuses its runtime_env"):
        collect(RayBackend, config_of(tiny_pipeline_dir, folder, reward), folder)


@pytest.mark.slow
@pytest.mark.fault
def test_the_death_of_a_hosted_reward_is_named(tiny_pipeline_dir: Path, folder: Path) -> None:
    config = config_of(tiny_pipeline_dir, folder, {"name": "deadly", "runtime_env": {"env_vars": {"SHIFT": "0"}}})
    with pytest.raises(ScorerFailed, match="reward 'deadly': the process of its runtime_env died"):
        collect(RayBackend, config, folder)


def test_without_ray_a_runtime_env_is_refused_with_the_way_out(tiny_pipeline_dir: Path, folder: Path) -> None:
    reward = {"name": "tripled", "runtime_env": {"env_vars": {"SHIFT": "0"}}}
    config = config_of(tiny_pipeline_dir, folder, reward, backend="local")
    with pytest.raises(SpecError, match=r"cluster\.backend=ray, or serve it"):
        LocalBackend(config, folder)


@pytest.mark.fault
def test_a_reward_that_hangs_ends_the_run_at_its_deadline(tiny_pipeline_dir: Path, folder: Path) -> None:
    config = config_of(tiny_pipeline_dir, folder, {"name": "asleep"}, backend="local", reward_deadline_s=1)
    with pytest.raises(ScorerHangs, match=r"'asleep' did not score a chunk within 1 s.*cluster\.reward_deadline_s"):
        collect(LocalBackend, config, folder)


def test_bounded_work_answers_raises_and_gives_up() -> None:
    nothing = Checked({}, {}, {})
    assert bounded("r", lambda: nothing, 5) is nothing
    with pytest.raises(KeyError, match="mine"):
        bounded("r", lambda: {}["mine"], 5)
    began = time.monotonic()
    with pytest.raises(ScorerHangs):
        bounded("r", lambda: time.sleep(60) or nothing, 0.2)
    assert time.monotonic() - began < 30
