"""The share of an iteration that is not the model comes from the tables that a profiled run writes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("overhead")


def test_processes_that_take_turns_add_up_their_passes_and_waiting_is_none(own: Any) -> None:
    rollout = {"rollout": {"network": 5.0, "decode": 1.0, "rest": 0.25}, "outside": {"rest": 3.75}}
    learner = {"learn": {"network": 1.0, "backward": 2.0, "rest": 0.5}, "outside": {"rest": 6.5}}
    found = own.measured({"rollout-0": rollout, "learner-0": learner})
    assert found == pytest.approx(
        {"iteration_s": 10, "not_model_s": 1, "share": 0.1, "rollout_rest_s": 0.25, "learn_rest_s": 0.5}
    )
    alone = {"rollout": {"network": 3.0, "texts": 0.5, "rest": 0.25}, "score": {"rest": 0.25}}
    assert own.measured({"local": alone})["share"] == pytest.approx(0.125)


def test_a_summary_has_the_median_and_the_ends_of_all_turns(own: Any) -> None:
    assert own.summary([{"share": 0.2}, {"share": 0.1}, {"share": 0.4}]) == {
        "share": {"median": 0.2, "least": 0.1, "most": 0.4}
    }
