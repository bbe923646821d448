"""The tables of the studies of the embedded world: those of their cells, which are of one base and one budget."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "scripts" / "benchmarks"
RESULTS = BENCHMARKS / "results"
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the studies, which find one another as those of a script do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("algorithms", "algorithms_compared", "algorithms_table", "alignments", "caching", "cells", "distillation")
    names += ("few_steps", "pages", "paths", "scaling", "straightening")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def test_the_page_holds_how_their_order_changed(own: Any) -> None:
    compared, algorithms = own.algorithms_compared, own.algorithms
    both = (algorithms.scores_of(directory)[0] for directory in (RESULTS / "algorithms-base-1", algorithms.OWN))
    made = compared.changed_markdown(compared.changed(*both), algorithms.TITLES)
    page = (ROOT / "docs" / "wind_tunnel.md").read_text(encoding="utf-8")
    assert f"{compared.CHANGED}\n{made}\n{compared.CHANGED_END}" in page


@pytest.mark.parametrize("name", ["few_steps", "straightening", "paths", "scaling", "caching"])
def test_the_page_holds_what_was_measured_of_base_models(own: Any, name: str) -> None:
    tables: dict[str, Callable[[], str]] = {
        "few_steps": own.few_steps.markdown,
        "straightening": own.straightening.markdown,
        "paths": lambda: own.paths.markdown(own.paths.load()),
        "scaling": lambda: own.scaling.markdown(own.scaling.load()),
        "caching": lambda: own.caching.markdown(json.loads((RESULTS / "caching.json").read_text())),
    }
    assert own.pages.table_in(name, own.pages.DOCS / "pretraining.md") == tables[name]()


def test_the_page_holds_the_teachers_and_students_that_were_measured() -> None:
    found = json.loads((RESULTS / "distillation.json").read_text())
    page = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    rows = {
        row[0]: row[1:] for line in page.splitlines() if len(row := [c.strip() for c in line.split("|")[1:-1]]) == 8
    }
    teachers, students = found["teachers"], found["students"]
    said = {
        "base": (teachers["objects"]["before"], None),
        "teacher of the first three": (teachers["objects"]["after"], teachers["objects"]["images"]),
        "teacher of the last three": (teachers["relations"]["after"], teachers["relations"]["images"]),
        "student": (students["same"]["after"], students["same"]["images"]),
        "student, SDE on another grid": (students["sde_grid"]["after"], students["sde_grid"]["images"]),
        "student without the third of four blocks, before": (students["three_blocks"]["before"], None),
        "the same, after": (students["three_blocks"]["after"], students["three_blocks"]["images"]),
    }
    for title, (scores, images) in said.items():
        cells = [cell.strip("*") for cell in rows[title]]
        assert cells == [*(f"{scores[task]:.2f}" for task in TASKS), "" if images is None else f"{images:,}"], title


def copied(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(RESULTS / name, tmp_path / name))


def changed(path: Path, **more: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


@pytest.mark.parametrize("key", ["base", "minutes", "evaluations", "num_samples"])
def test_algorithms_of_two_bases_or_budgets_are_in_no_table(own: Any, tmp_path: Path, key: str) -> None:
    cells, titles = copied("algorithms", tmp_path), own.algorithms.TITLES
    assert own.algorithms_table.load(cells, titles)
    changed(cells / "sft-seed0.json", **{key: 5})
    with pytest.raises(SystemExit, match=f"has cells of different {key}"):
        own.algorithms_table.load(cells, titles)


def test_seeds_of_an_algorithm_that_has_other_settings_are_in_no_table(own: Any, tmp_path: Path) -> None:
    cells, titles = copied("algorithms", tmp_path), own.algorithms.TITLES
    changed(cells / "nft-seed1.json", settings={"algorithm.solver": "euler"})
    with pytest.raises(SystemExit, match="has cells of different settings"):
        own.algorithms_table.load(cells, titles)


@pytest.mark.parametrize("name", ["few_steps", "straightening", "paths", "scaling"])
def test_students_of_two_bases_are_in_no_table(
    own: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = getattr(own, name)
    monkeypatch.setattr(study, "OWN", copied(name, tmp_path))
    changed(max(study.OWN.glob("*.json")), base="another")
    with pytest.raises(SystemExit, match=f"{name} has cells of different base"):
        study.markdown() if name in ("few_steps", "straightening") else study.load()


def test_a_cell_of_an_earlier_base_is_not_taken_for_one_of_today_s(own: Any, tmp_path: Path) -> None:
    def never() -> dict[str, Any]:
        raise AssertionError("runs")

    shutil.copy(RESULTS / "few_steps" / "meanflow.json", tmp_path)
    changed(tmp_path / "meanflow.json", base="another")
    asked = own.few_steps.asked("meanflow", SimpleNamespace(steps=600, num_samples=384))
    with pytest.raises(SystemExit, match=r"meanflow\.json is of another run \(base differ\)"):
        own.cells.run_once(tmp_path / "meanflow.json", never, asked, cell="meanflow")
    changed(tmp_path / "meanflow.json", base=asked["base"])
    own.cells.run_once(tmp_path / "meanflow.json", never, asked, cell="meanflow")  # which is finished
    own.cells.run_once(tmp_path / "new.json", lambda: {"scores": 1}, asked, cell="meanflow")
    assert json.loads((tmp_path / "new.json").read_text()) == {**asked, "scores": 1}


@pytest.mark.parametrize("key", ["base", "teacher_iterations", "student_iterations"])
def test_students_of_other_teachers_do_not_stay_beside_new_ones(
    own: Any, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(RESULTS / "distillation.json", tmp_path)
    changed(tmp_path / "distillation.json", **{key: 5})
    monkeypatch.setattr(own.distillation, "RESULTS", tmp_path)
    monkeypatch.setattr(own.distillation, "teach", None)
    monkeypatch.setattr("sys.argv", ["distillation.py", "--work-dir", str(tmp_path)])
    with pytest.raises(SystemExit, match=rf"distillation\.json is of another run \({key} differ\)"):
        own.distillation.main()


def test_the_committed_algorithms_are_what_a_run_would_make(own: Any) -> None:
    """But AWM without a KL, as the page says: with another rate and solver it was to be shown as it breaks."""
    other = {}
    for path in sorted(own.algorithms.OWN.glob("*-seed*.json")):
        cell = json.loads(path.read_text())
        budget = own.alignments.Budget(cell["minutes"])
        wanted = own.alignments.asked(cell["cell"], own.algorithms.CELLS[cell["cell"]], cell["seed"], budget)
        del wanted["overrides"]
        try:
            own.cells.refuse_another(path, wanted)
        except SystemExit as error:
            other[cell["cell"]] = str(error)
    assert list(other) == ["awm_free"] and re.search(r"settings: .*algorithm\.solver", other["awm_free"])
    page = " ".join((ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8").split())
    assert "AWM without a KL is a cell of the search, at 6e-5 and with images by Euler" in page
