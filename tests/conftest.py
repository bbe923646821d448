"""Fixtures of more than one package."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from tests.tiny import write_pipeline

settings.register_profile("suite", deadline=None)  # a loaded machine is no fault of an example
settings.load_profile("suite")


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real StableDiffusion3Pipeline directory, random and with one block."""
    return write_pipeline(tmp_path_factory.mktemp("pipeline"), shift=1.0, scaling=1.0, offset=0.0, half=False)
