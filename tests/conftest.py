"""Fixtures of more than one package."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.tiny import write_pipeline

settings.register_profile("suite", deadline=None)  # a loaded machine is no fault of an example
settings.load_profile("suite")
# A walk over all objects of torch and diffusers takes 0.3 s, which is a tenth of a suite that makes it often.
gc.set_threshold(50_000, 20, 50)

MATRIX = ("family", "algorithm", "weights", "killed", "replay", "export", "seconds")
RANKS = {"tests/engine/test_convert.py", "tests/engine/test_sharded.py", "tests/algorithms/test_invariance.py"}
FIRST = ("tests/cluster/", "tests/engine/", "tests/algorithms/test_invariance", "tests/fault/", "tests/test_")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files that mostly wait or take long, so that the end of a run finds short ones for every worker."""
    order = {folder: rank for rank, folder in enumerate(FIRST)}
    items.sort(key=lambda item: next((order[f] for f in FIRST if item.nodeid.startswith(f)), len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the files together whose ranks are forks of the same processes (`tests.forkserver`)."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "ranks" if file in RANKS else file

    return Together(config, log)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the rows that `tests.families.test_matrix` records as one table."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    reports = [report for report in reports if getattr(report, "when", "") == "call"]
    rows = [dict(report.user_properties).get("matrix") for report in reports]
    if rows := sorted(filter(None, rows)):
        terminalreporter.section("families")
        for row in [MATRIX, *rows]:
            terminalreporter.write_line("".join(str(cell).ljust(16) for cell in row).rstrip())


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real StableDiffusion3Pipeline directory, random and with one block."""
    return write_pipeline(tmp_path_factory.mktemp("pipeline"), shift=1.0, scaling=1.0, offset=0.0, half=False)
