"""Fixtures of more than one package."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.tiny import write_pipeline

settings.register_profile("suite", deadline=None)  # a loaded machine is no fault of an example
settings.load_profile("suite")
# A walk over all objects of torch and diffusers takes 0.3 s, which is a tenth of a suite that makes it often.
gc.set_threshold(50_000, 20, 50)
# What a script runs in the background is born deaf to Ctrl-C, and so would be all that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

MATRIX = ("family", "algorithm", "weights", "killed", "replay", "export", "seconds")
RANKS = {f"tests/engine/test_{name}.py" for name in ("activation_checkpointing", "convert", "offload", "sharded")}
RANKS |= {"tests/algorithms/test_invariance.py"}
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

        def remove_node(self, node: Any) -> str | None:
            """Give on what a dead worker had left, without the test that it died in and the files that it had ended.

            xdist 3.8 gives on those too: the test kills the next worker, and a file of which nothing is left is work
            whose end no worker ever reports, so the run waits for ever.
            """
            files = self.assigned_work.pop(node)
            died_in = next((test for file in files.values() for test, ended in file.items() if not ended), None)
            for file in files.values():
                if died_in in file:
                    file[died_in] = True
            self.workqueue.update({name: file for name, file in files.items() if not all(file.values())})
            for other in self.assigned_work:
                self._reschedule(other)
            return died_in

    return Together(config, log)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say in a log at once which test failed and how: the summary at the end is lost with a run that has no end."""
    if report.failed and not sys.stdout.isatty() and "PYTEST_XDIST_WORKER" not in os.environ:
        error = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")] or [str(report.longrepr)]
        when = report.when if report.when in ("setup", "call", "teardown") else "the death of its worker"
        print(f"\nFAILED in {when}: {report.nodeid}\n" + "\n".join(error[-8:])[-2000:], flush=True)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the rows that tests of the families, of their recipes and of ``real.py`` record as one table."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    reports = [report for report in reports if getattr(report, "when", "") == "call"]
    rows = [dict(report.user_properties).get("matrix") for report in reports]
    if rows := sorted(filter(None, rows)):
        terminalreporter.section("families")
        table = [[str(cell) for cell in row] for row in [MATRIX, *rows]]
        widths = [max(map(len, column)) + 2 for column in zip(*table, strict=True)]
        for row in table:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            terminalreporter.write_line("".join(cells).rstrip())


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real StableDiffusion3Pipeline directory, random and with one block."""
    return write_pipeline(tmp_path_factory.mktemp("pipeline"), shift=1.0, scaling=1.0, offset=0.0, half=False)
