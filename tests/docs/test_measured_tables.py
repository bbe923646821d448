"""The tables that scripts write into docs/running.md are those of their results, and show what the page claims."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "scripts" / "benchmarks"
PARTS = {"planned": "runs", "offload": None, "answers": "models"}


def results(name: str) -> Any:
    found = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
    part = PARTS[name]
    return found if part is None else found[part]


@pytest.mark.parametrize("name", PARTS)
def test_a_table_is_that_of_the_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    program, pages = (importlib.import_module(module) for module in (name, "pages"))
    assert pages.table_in(name, ROOT / "docs" / "running.md") == program.table(results(name))


def test_what_is_planned_is_within_15_percent_of_what_was_resident() -> None:
    runs = results("planned")
    assert len(runs) == 5
    assert all(0.85 <= own["planned_of_measured"] <= 1.15 for own in runs.values())


def test_offload_takes_away_what_is_planned_and_moves_no_bit() -> None:
    found = results("offload")
    for name in ("whole", "lora"):
        assert found[name]["same_bits"] and 0.85 <= found[name]["of_plan"] <= 1.15
    assert 0 < found["bases"]["bfloat16"]["deviation"] < found["bases"]["int8"]["deviation"]


def test_every_model_is_answered_on_each_of_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    program = importlib.import_module("answers")
    found = results("answers")
    assert list(found) == list(program.RECIPES)
    assert all(list(own) == list(program.CARDS) for own in found.values())
