"""Each command's help ends with two examples that can be typed as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.intake.file import load_run

ROOT = Path(__file__).resolve().parents[2]
GROUP: Any = typer.main.get_command(app)
RUNS = ("align", "pretrain", "distill", "check", "plan", "launch")


def help_of(*command: str) -> list[str]:
    """The lines of a command's help in a terminal of 80 columns."""
    shown = CliRunner(env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).invoke(app, [*command, "--help"])
    assert shown.exit_code == 0
    return [line.rstrip() for line in shown.output.rstrip().splitlines()]


def examples_of(*command: str) -> list[list[str]]:
    lines = help_of(*command)
    end = "\n".join(lines[lines.index(" Examples:") + 1 :])
    return [shlex.split(line) for line in end.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("command", GROUP.commands)
def test_a_help_ends_with_two_examples_whose_options_exist(command: str) -> None:
    examples = examples_of(command)
    assert [words[:2] for words in examples] == [["flowalign", command]] * 2
    for _, _, *words in examples:
        parsed = [word for word in words if word != "--json"]  # which moves standard output as soon as it is parsed
        assert GROUP.commands[command].make_context(command, parsed).params  # raises for an option that is unknown
        for name in words:
            assert not name.startswith("configs/") or (ROOT / name).is_file(), name


@pytest.mark.parametrize("command", RUNS)
def test_a_configuration_of_an_example_is_read_with_its_overrides(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for _, _, *words in examples_of(command):
        file = next(word for word in words if word.endswith(".yaml"))
        if file.startswith("configs/"):
            overrides = [word for word in words if "=" in word]
            load_run(Path(file), overrides, command if command in ("align", "pretrain", "distill") else None)


def test_the_help_of_all_begins_where_a_newcomer_does() -> None:
    assert [words[1] for words in examples_of()] == ["init", "align"]


@pytest.mark.parametrize("command", GROUP.commands)
def test_a_help_of_80_columns_loses_no_word(command: str) -> None:
    lines = help_of(command)
    assert max(map(len, lines)) <= 80
    cut = [line for line in lines if re.search(r"\w…", line)]
    assert not cut, cut
