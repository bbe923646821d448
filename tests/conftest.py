"""Fixtures of more than one package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.tiny import write_pipeline

settings.register_profile("suite", deadline=None)  # a loaded machine is no fault of an example
settings.load_profile("suite")


RAY = ("tests/cluster/", "tests/fault/test_frozen_ray.py", "tests/fault/test_lost_ray.py", "tests/samples/test_whole")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process a file at a time, but one process all that start a Ray: two that start at once wait long."""
    from xdist.scheduler import LoadFileScheduling

    class OneRay(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith(RAY) else super()._split_scope(nodeid)

    return OneRay(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real StableDiffusion3Pipeline directory, random and with one block."""
    return write_pipeline(tmp_path_factory.mktemp("pipeline"), shift=1.0, scaling=1.0, offset=0.0, half=False)
