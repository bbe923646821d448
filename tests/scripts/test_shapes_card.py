"""``scripts/shapes_card.py``: what it writes checksums of."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from flowalign.shapes.prompts import TASKS, evaluation_set

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_the_shipped_card_is_what_the_script_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the scores, which it measures: words that were added to the card alone would be gone the next time."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    card = importlib.import_module("shapes_card")
    told = json.loads((SCRIPTS / "benchmarks" / "results" / "words.json").read_text())
    template = (SCRIPTS / "shapes_card.md").read_text().replace("{{words}}", card.words(told))
    parts = map(re.escape, re.split(r"\{\{(?:scores|machine)\}\}", template))
    assert re.fullmatch("(?s:.+?)".join(parts), (card.ASSETS / "README.md").read_text())


def test_the_card_says_how_many_prompts_a_task_has() -> None:
    above, there = evaluation_set(600), evaluation_set(24 * len(TASKS))
    of = {task: [row["prompt"] for row in there if row["tag"] == task] for task in TASKS}
    assert all([row["prompt"] for row in above if row["tag"] == task][:24] == own for task, own in of.items())
    assert {task: len(set(own)) for task, own in of.items() if len(set(own)) < 24} == {
        "single_object": 6,
        "counting": 18,
        "colors": 9,
    }


@pytest.mark.parametrize("stray", [".README.md.swp", "pipeline/weights.part", "pipeline/.config.json"])
def test_a_file_that_does_not_ship_is_named_and_gets_no_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stray: str
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    card = importlib.import_module("shapes_card")
    assert [path.name for path in card.shipped()]
    monkeypatch.setattr(card, "ASSETS", tmp_path)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "config.json").write_text("{}")
    lines = card.checksums(card.shipped())
    assert lines.endswith("  pipeline/config.json\n") and lines.count("\n") == 1
    (tmp_path / stray).write_text("x")
    with pytest.raises(SystemExit, match=stray.rpartition("/")[2]):
        card.shipped()
