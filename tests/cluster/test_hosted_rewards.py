"""Rewards in a process and environment of their own, on a real Ray; and rewards that never come back."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from flowalign.cluster.local import LocalBackend
from flowalign.cluster.ray_backend import RayBackend
from flowalign.cluster.run import build_run
from flowalign.config import AlignConfig
from flowalign.scoring import ScorerHangs, bounded
from rewards.interface import Checked, ScorerFailed, SpecError
from tests.cluster.runs import small_config

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
        run = build_run(config, folder)
        backend.sync()
        return backend.collect(run.sampler.batch(0), run.algorithm.rollout_plan(0, run.seed), seed=run.seed)
    finally:
        backend.close()
        assert not ray.is_initialized()


def test_a_reward_runs_with_the_packages_and_variables_of_its_own_environment(
    tiny_pipeline_dir: Path, folder: Path
) -> None:
    path = os.pathsep.join(filter(None, [str(folder / "library"), os.environ.get("PYTHONPATH")]))
    environment = {"env_vars": {"SHIFT": "10", "PYTHONPATH": path}}
    config = config_of(tiny_pipeline_dir, folder, {"name": "tripled", "runtime_env": environment})
    collected = collect(RayBackend, config, folder)
    brightness = collected.rollout.images.numpy().mean((1, 2, 3)) / 255
    np.testing.assert_allclose(collected.scores.total, 10 + 3 * brightness, rtol=1e-6)
    with pytest.raises(ModuleNotFoundError):
        __import__("only_there")


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
@pytest.mark.parametrize("backend", [LocalBackend, RayBackend])
def test_a_reward_that_hangs_ends_the_run_at_its_deadline(
    tiny_pipeline_dir: Path, folder: Path, backend: Callable[[AlignConfig, Path], Any]
) -> None:
    name = "ray" if backend is RayBackend else "local"
    config = config_of(tiny_pipeline_dir, folder, {"name": "asleep"}, backend=name, reward_deadline_s=1)
    with pytest.raises(ScorerHangs, match=r"'asleep' did not score a chunk within 1 s.*cluster\.reward_deadline_s"):
        collect(backend, config, folder)


def test_bounded_work_answers_raises_and_gives_up() -> None:
    nothing = Checked({}, {}, {})
    assert bounded("r", lambda: nothing, 5) is nothing
    with pytest.raises(KeyError, match="mine"):
        bounded("r", lambda: {}["mine"], 5)
    began = time.monotonic()
    with pytest.raises(ScorerHangs):
        bounded("r", lambda: time.sleep(60) or nothing, 0.2)
    assert time.monotonic() - began < 30
