"""Puts each configuration that a test sees refused to the command that runs it and to ``flowalign check`` as well.

A plugin: ``python -m pytest -p tests.cli.both tests/intake``. What the two say differently, and how many there were, is
written to the file that ``REFUSED_BY_BOTH`` names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.config.section import ConfigError
from flowalign.intake import file
from flowalign.run import prepared

COMMANDS = ("align", "pretrain", "distill")
Invoke = Callable[..., Any]


class Both:
    """Stands before `load_align`, `load_pretrain`, `prepare` and `CliRunner.invoke`; asks both commands of a refusal.

    A run that was prepared has started: what is refused then is known too late for `check`.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.differences: list[dict[str, Any]] = []
        self.within, self.started = False, False
        self.invoke: Invoke = CliRunner.invoke

    def loading(self, load: Callable[..., Any], usual: str) -> Callable[..., Any]:
        def loaded(path: Path, overrides: Sequence[str] = (), **options: Any) -> Any:
            try:
                return load(path, overrides, **options)
            except ConfigError:
                if not self.within and options.get("require_files", True):
                    CliRunner().invoke(app, [options.get("command", usual), str(path), *overrides])
                raise

        return loaded

    def preparing(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **options: Any) -> Any:
            found = prepare(*args, **options)
            self.started = True
            return found

        return made

    def invoked(self, runner: CliRunner, called: Any, words: Any = None, **options: Any) -> Any:
        words = list(words or ())
        if self.within or not words or words[0] not in COMMANDS or called is not app:
            return self.invoke(runner, called, words, **options)
        self.within, self.started = True, False
        try:
            done = self.invoke(runner, called, words, **options)
            if done.exit_code == 2 and not self.started and "--dry-run" not in words and sentence(done):
                self.compare(words, done)
            return done
        finally:
            self.within = False

    def compare(self, words: list[str], done: Any) -> None:
        asked = ["check", *(word for word in words[1:] if word not in ("--json", "--profile")), "--as", words[0]]
        seen = self.invoke(CliRunner(), app, asked)
        self.asked.append(" ".join(words))
        if (seen.exit_code, sentence(seen)) != (2, sentence(done)):
            said = {"check": [seen.exit_code, sentence(seen)], words[0]: sentence(done)}
            self.differences.append({"words": words, **said, "exception": repr(seen.exception)})


def sentence(done: Any) -> str:
    """The sentence by which a command refuses; empty where it says none."""
    return next((line for line in done.stderr.splitlines() if line.startswith("error: ")), "")


both = Both()
file.load_align = both.loading(file.load_align, "align")
file.load_pretrain = both.loading(file.load_pretrain, "pretrain")
prepared.prepare = both.preparing(prepared.prepare)
CliRunner.invoke = lambda runner, *args, **options: both.invoked(runner, *args, **options)  # type: ignore[method-assign]


def pytest_sessionfinish() -> None:
    found = {"asked": both.asked, "differences": both.differences}
    Path(os.environ["REFUSED_BY_BOTH"]).write_text(json.dumps(found, indent=1))
