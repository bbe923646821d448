"""``algorithms.py compare``: pairs are counted as by hand, chance as chance, and every figure has a source."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks import algorithms_compared as compared
from benchmarks.algorithms_compared import Study
from benchmarks.cells import insert
from pydantic import ValidationError
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
RAW: list[dict[str, Any]] = json.loads(compared.PUBLISHED.read_text(encoding="utf-8"))["studies"]
MANY = 10**9  # samples, so many that only seeds are chance


def study(order: str, paper: str = "2505.05470", **more: Any) -> Study:
    """One that ranks algorithms of one letter; those of a word share a rank: ``a bc`` is a, then b and c."""
    ranks = {name: float(rank) for rank, names in enumerate(order.split(), 1) for name in names}
    source = {"arxiv": paper, "where": "table 1", "read": "text"}
    given = {"name": order, "source": source, "base": "SD3.5-M", "trained_on": "GenEval", "equal": "end"}
    return Study(**{**given, "cells": {name: name for name in ranks}, "ranks": ranks, **more})


def test_several_metrics_are_ranked_by_their_mean_rank() -> None:
    metrics = {"x": {"a": 0.9, "b": 0.8, "c": 0.8}, "y": {"a": 20.0, "b": 22.0, "c": 21.0}}
    own = study("a b c", ranks={}, metrics=metrics)
    assert own.ranked() == {"a": 2.0, "b": 1.75, "c": 2.25}  # x: 1, 2.5, 2.5; y: 3, 1, 2
    assert own.pairs("abc") == [("a", "c"), ("b", "a"), ("b", "c")]
    assert own.pairs("ac") == [("a", "c")]


def test_pairs_are_counted_as_by_hand() -> None:
    """Ours: b > a > c > d, far more than chance. One paper says a > b > c > d: 5 of 6. One says d > c: none."""
    scores = {"a": [0.6], "b": [0.7], "c": [0.5], "d": [0.4]}
    found = compared.compare([study("a b c d"), study("d c", "2509.16117")], scores, MANY)
    first, second = found["studies"]
    assert (first["same"], first["pairs"], second["same"], second["pairs"]) == (5, 6, 0, 1)
    assert first["kendall_tau"] == pytest.approx((5 - 1) / 6)
    assert first["spearman_rho"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert (second["kendall_tau"], second["spearman_rho"]) == pytest.approx((-1, -1))
    every = found["pooled"]["all"]
    assert (every["papers"], every["pairs"], every["distinct_pairs"]) == (2, 7, 6)
    assert every["share"] == every["share_of_means"] == pytest.approx(5 / 7)
    assert found["pooled"]["equal compute"] is None


def test_what_a_paper_ranks_equal_is_no_pair() -> None:
    found = compared.compare([study("ab c"), study("ac")], {"a": [0.5], "b": [0.4], "c": [0.3]}, MANY)
    assert [one["pairs"] for one in found["studies"]] == [2, 0]
    assert found["studies"][0]["kendall_tau"] == pytest.approx(2 / (2 * 3) ** 0.5)  # tau-b: 2 of 2 untied, 3 of ours
    assert found["studies"][1]["kendall_tau"] is None


def test_a_difference_counts_by_its_probability() -> None:
    """Of seeds alone that is Student's: a and b have 3 and 2 seeds, c one, and 3 degrees of freedom are theirs."""
    scores = {"a": [0.50, 0.52, 0.54], "b": [0.49, 0.51], "c": [0.47]}
    deviation = ((2 * 0.02**2 + 2 * 0.01**2) / 3) ** 0.5
    for pair, difference, seeds in (("a b", 0.02, 1 / 3 + 1 / 2), ("c a", -0.05, 1 + 1 / 3)):
        found = compared.compare([study(pair)], scores, MANY, replicates=200_000)
        wanted = stats.t.cdf(difference / (deviation * seeds**0.5), 3)
        assert found["pooled"]["all"]["share"] == pytest.approx(float(wanted), abs=0.005)


def test_samples_are_chance_however_many_seeds() -> None:
    """0.6 and 0.5 of 100 samples: with one seed each, seeds vary as samples do; with many that agree, samples alone."""
    sampling = (0.6 * 0.4 + 0.5 * 0.5) / 100
    for seeds, variance in ((1, 2 * sampling), (50, sampling)):
        found = compared.compare([study("a b")], {"a": [0.6] * seeds, "b": [0.5] * seeds}, 100, replicates=200_000)
        wanted = float(stats.norm.cdf(0.1 / variance**0.5))
        assert found["pooled"]["all"]["share"] == pytest.approx(wanted, abs=0.005)


def test_equal_scores_are_guessing() -> None:
    every = compared.compare([study("a b c")], {name: [0.5] for name in "abc"}, 600)["pooled"]["all"]
    assert every["share"] == pytest.approx(0.5, abs=0.02) and every["share_of_means"] == 0.5
    assert every["interval"][0] < 0.3 and every["interval"][1] > 0.7


def test_the_interval_narrows_with_papers_not_with_studies_of_one() -> None:
    scores = {"a": [0.9], "b": [0.1]}

    def low(papers: int, studies: int) -> float:
        own = [study("a b", f"2505.{paper:05}") for paper in range(papers) for _ in range(studies)]
        return compared.compare(own, scores, MANY)["pooled"]["all"]["interval"][0]

    assert low(1, 1) < 0.25  # one paper, and one of which nothing is known
    assert low(1, 20) == pytest.approx(low(1, 1))
    assert low(1, 1) < low(3, 1) < 0.5 < low(10, 1) < low(40, 1)
    assert low(40, 1) > 0.9


def test_the_interval_of_the_reverse_is_the_reverse() -> None:
    scores = {"a": [0.6, 0.62], "b": [0.58], "c": [0.5]}
    ahead, reverse = (
        compared.compare([study(order), study(order, "2509.16117")], scores, 600)["pooled"]["all"]
        for order in ("a b c", "c b a")
    )
    assert reverse["share"] == pytest.approx(1 - ahead["share"])
    assert reverse["interval"] == pytest.approx([1 - end for end in reversed(ahead["interval"])], abs=0.02)


@pytest.mark.parametrize("scores", [{"a": [0.5]}, {"a": [0.5], "b": [0.6]}, {"a": [0.5, 0.6], "b": [0.5], "z": [0.2]}])
def test_any_cells_make_tables(scores: dict[str, list[float]]) -> None:
    studies = [study("a b c"), study("c d", equal="compute")]
    found = compared.compare(studies, scores, 600, replicates=100)
    json.dumps(found, allow_nan=False)
    made = compared.markdown(studies, found, {name: name.upper() for name in "abcdz"}, 10)
    head, first, second = (line for line in made.splitlines() if line.startswith(("| study", "| [")))
    assert head.count("|") == first.count("|") == second.count("|")
    assert "not measured: C" in first and "a > b > c" in first and "https://arxiv.org/abs/2505.05470" in first
    assert second.endswith("| not measured: C; not measured: D | - | - | - |")


def test_the_table_writes_both_orders_and_the_shares() -> None:
    scores = {"a": [0.6], "b": [0.7], "c": [0.5]}
    studies = [study("ab c")]
    made = compared.markdown(studies, compared.compare(studies, scores, MANY), {"a": "A", "b": "B", "c": "C"}, 10)
    row = "| SD3.5-M, GenEval | end | a = b > c | B 0.700 > A 0.600 > C 0.500 | 2.0 of 2 | 0.82 | 0.87 |"
    assert row in made
    assert "| all | 1 | 2 | 2 | 1.00 | " in made and "| equal compute | 0 | 0 | 0 | - | - | - |" in made


def test_the_same_cells_give_the_same_figures() -> None:
    scores = {"a": [0.6, 0.61], "b": [0.6]}
    assert compared.compare([study("a b")], scores, 600) == compared.compare([study("a b")], scores, 600)


@pytest.mark.parametrize("entry", RAW, ids=lambda entry: entry["name"])
def test_every_published_figure_says_where_it_stands(entry: dict[str, Any]) -> None:
    own = Study.model_validate(entry)
    assert own.source.where and own.source.address.startswith("https://arxiv.org/abs/")
    for key in ("source", "base", "trained_on", "equal", "cells"):
        with pytest.raises(ValidationError, match=key):
            Study.model_validate({name: value for name, value in entry.items() if name != key})
    for key in ("arxiv", "where", "read"):
        with pytest.raises(ValidationError, match=key):
            Study.model_validate({**entry, "source": {**entry["source"], key: ""}})


def test_studies_have_names_of_their_own() -> None:
    assert len({entry["name"] for entry in RAW}) == len(RAW)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": {"a": 1}}, "not the algorithms"),
        ({"ranks": {}}, "either"),
        ({"metrics": {"x": {"a": 1, "b": 2}}}, "either"),
        ({"cells": {"a": "a", "b": "a"}}, "one cell"),
        ({"cells": {"a": "a"}}, "cells"),
        ({"equal": "luck"}, "equal"),
    ],
)
def test_a_study_that_lacks_something_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        study("a b", **change)


def test_a_cell_that_there_is_not_is_named(tmp_path: Path) -> None:
    path = tmp_path / "published.json"
    path.write_text(json.dumps({"studies": [study("a b").model_dump()]}))
    assert [own.name for own in compared.read_studies("ab", path)] == ["a b"]
    with pytest.raises(SystemExit, match=r"published\.json: a b: b is 'b'; there are a, c"):
        compared.read_studies("ac", path)


def test_what_is_written_stands_between_the_marks_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x -->\nold\n<!-- end -->\nafter, π\n", encoding="utf-8")
    for table in ("| ² |", "| new |"):
        insert(table, page, "<!-- x -->", "<!-- end -->")
        assert page.read_text(encoding="utf-8") == f"before\n<!-- x -->\n{table}\n<!-- end -->\nafter, π\n"
    for marks in (("<!-- y -->", "<!-- end -->"), ("<!-- x -->", "<!-- done -->")):
        with pytest.raises(SystemExit, match="lacks the marks"):
            insert("lost", page, *marks)
    assert "lost" not in page.read_text(encoding="utf-8")


def test_the_page_holds_what_the_committed_cells_give() -> None:
    """So every name of the studies is a cell's: the command refuses others."""
    made = subprocess.run(
        [sys.executable, "-c", "import algorithms; print(algorithms.compared()[1])"],
        cwd=ROOT / "scripts" / "benchmarks",
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert made.returncode == 0, made.stderr[-3000:]
    page = (ROOT / "docs" / "wind_tunnel.md").read_text(encoding="utf-8")
    assert f"{compared.BEGIN}\n{made.stdout.strip()}\n{compared.END}" in page


def test_equal_draws_count_a_half() -> None:
    drawn = {"a": np.array([1.0, 1.0, 1.0, 1.0]), "b": np.array([0.0, 0.0, 2.0, 1.0])}
    assert compared.same(("a", "b"), drawn).tolist() == [1, 1, 0, 0.5]
    assert compared.same(("b", "a"), drawn).tolist() == [0, 0, 1, 0.5]


def test_two_orders_of_ours_are_set_beside_each_other() -> None:
    before, now = {"a": [0.6, 0.7], "b": [0.5], "c": [0.4], "gone": [0.1]}, {"c": [0.5], "b": [0.6], "a": [0.55]}
    found = compared.changed(before, now)
    assert list(found["cells"]) == ["b", "a", "c"] and found["cells"]["a"]["before"] == pytest.approx(0.65)
    assert [own["rank_before"] for own in found["cells"].values()] == [2, 1, 3]
    assert found["tau"][0] == pytest.approx(1 / 3) and found["rho"][0] == pytest.approx(0.5)
    written = compared.changed_markdown(found, {"a": "A", "b": "B", "c": "C"})
    assert "| A | 0.650 | 0.550 | 1 | 2 |" in written and written.endswith("of 3 algorithms that both have.")
    with pytest.raises(SystemExit, match="fewer than two algorithms"):
        compared.changed({"a": [0.1]}, now)
