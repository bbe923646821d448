"""What `flowalign prompts` says of a source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.config.prompts import PromptsConfig
from flowalign.config.sections import SHIPPED, ModelConfig
from flowalign.data.promptsets import PromptsError
from flowalign.measure.promptset import look_at, spread
from flowalign.models.textlength import cut_prompts

MODEL = ModelConfig(path=str(SHIPPED / "pipeline"), max_sequence_length=2)
LONG = "a photo of a red star and a blue circle and a green square and two yellow triangles"
TABLE = f"prompt,kind\na photo of a red star,x\n,x\n{LONG},y\na photo of a red star,\na\u200b dog,x\n"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "p.csv"
    path.write_text(TABLE)
    return path


def test_counts_lengths_tasks_and_faults_are_those_of_the_rows(table: Path) -> None:
    found = look_at(PromptsConfig(source=str(table), columns={"task": "kind"}), MODEL)
    assert (found.rows, found.distinct, found.empty) == (4, 3, 1)
    assert found.tasks == {"x": 2, "y": 1, "": 1}
    assert found.duplicates == [("line 5", "line 2")]
    assert len(found.wrong) == 1 and found.wrong[0].startswith(f'{table}, line 3: "prompt" is missing')
    clip = found.lengths["CLIP"]
    assert (clip.shortest, clip.longest, clip.limit, clip.longer) == (8, 21, 16, 1)  # with two marks
    assert [(cut.prompts, cut.limit) for cut in cut_prompts(MODEL, [LONG, "a"])] == [(clip.longer, clip.limit)]
    assert found.invisible.startswith("1 holds invisible characters (zero width space)")


def test_a_spread_is_that_of_the_sorted_lengths() -> None:
    found = spread([*range(100, 0, -1)], limit=90)
    assert (found.shortest, found.median, found.most, found.longest, found.longer) == (1, 51, 96, 100, 10)


def test_nothing_right_in_a_source_and_nothing_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PromptsError, match="does not exist"):
        look_at(str(tmp_path / "absent.csv"))
    (tmp_path / "p.jsonl").write_text('{"prompt": ""}\n')
    found = look_at(str(tmp_path / "p.jsonl"))
    assert (found.rows, found.empty, dict(found.lengths)) == (0, 1, {})


def shown(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["prompts", *arguments])
    return result.exit_code, result.output


def test_the_command_says_what_a_run_would_refuse_and_prints_an_object(table: Path) -> None:
    code, said = shown(str(table))
    assert code == 2 and f"{table}, line 3" in said and "line 5 is line 2 again" in said
    code, said = shown(str(table), "--column", "task=kind", "--where", "kind=y", "--model", "shapes", "--json")
    assert code == 0
    found = json.loads(said.splitlines()[-1])
    assert found["tasks"] == {"y": 1} and found["lengths"]["CLIP"]["longer"] == 1 and found["first"] == [LONG]
    code, said = shown(str(table), "--where", "kind")
    assert code == 2 and "--where: 'kind' is no pair; write such as task=colors" in said


def test_the_help_ends_with_two_examples() -> None:
    said = CliRunner().invoke(app, ["prompts", "--help"]).output
    assert "flowalign prompts prompts.txt" in said and "flowalign prompts captions.csv" in said
