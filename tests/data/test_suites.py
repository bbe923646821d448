"""Tables of public suites as rows with questions."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from flowalign.data.suites import rows_of_questions
from rewards.scorers.vlm_questions import questions_of

HEAD = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"
)
TABLE = HEAD + (
    'a,"A red dog, running",,1,0,entity,whole,entity - whole (dog),Is there a dog?\n'
    'a,"A red dog, running",,2,1,attribute,color,"attribute - color (dog, red)",Is the dog red?\n'
    'a,"A red dog, running",,3,"1,2",relation,x,y,"Is the red dog running?"\n'
    "b,Two stars,,1,0,entity,whole,z,Are there stars?\n"
)


def test_a_table_with_a_row_a_question_becomes_a_row_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "dpg.csv").write_text(TABLE)
    command = [sys.executable, "-m", "flowalign.data.suites", str(tmp_path / "dpg.csv"), str(tmp_path / "dpg.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("2 prompts with 4 questions in ")
    rows = [json.loads(line) for line in (tmp_path / "dpg.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["id"]) for row in rows] == [("A red dog, running", "a"), ("Two stars", "b")]
    assert questions_of(rows[0]) == [
        ("Is there a dog?", ()),
        ("Is the dog red?", (0,)),
        ("Is the red dog running?", (0, 1)),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("item_id,text\na,b\n", "line 2 has no proposition_id"),
        (TABLE.replace('"1,2"', "7"), "a: question 3 depends on 7, which is not there"),
    ],
)
def test_a_table_of_another_form_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rows_of_questions(csv.DictReader(text.splitlines()))
