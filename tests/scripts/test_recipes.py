"""``scripts/benchmarks/recipes.py``: every cell's configuration loads, and what a search keeps, skips and prints."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "scripts" / "benchmarks"
PROGRAM = [sys.executable, str(BENCHMARKS / "recipes.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
STRICT = "eval/geneval_strict/overall"


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the study, which find one another as those of a script do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("alignments", "algorithms", "cells", "recipes", "recipes_cells", "recipes_table")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def test_the_configuration_of_every_cell_loads(own: Any) -> None:
    done = subprocess.run([*PROGRAM, "check"], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert said["faults"] == []
    assert said["cells"]["algorithms"] == len(own.algorithms.CELLS) and said["cells"]["screen"] == len(
        own.recipes_cells.SCREEN
    )
    assert said["cells"]["tune"] == 7 * len(own.algorithms.CELLS) + 2
    kinds = [set(found.types) for found in own.recipes_cells.FINDINGS.values()]
    assert set().union(*kinds) == {"flow_grpo", "nft", "awm", "sft", "diffusion_dpo"}  # the check names one of each


def test_a_misspelt_key_and_a_cell_that_changes_nothing_are_faults(own: Any) -> None:
    cell = partial(own.alignments.Cell, "nft", "")
    cells = {"a": cell({}), "b": cell({"algorithm.bta": 2}), "c": cell({"algorithm.beta": 1.0}), "d": cell({"seed": 1})}
    found = list(own.alignments.faults(cells))
    assert (
        len(found) == 2 and re.match(r"b: algorithm\.bta: .*beta", found[0]) and found[1] == "c: is the same run as a"
    )


def test_minutes_become_iterations_by_the_seconds_of_one(own: Any) -> None:
    cell = own.alignments.Cell("nft", "", {"learner.updates_per_iteration": 2})
    keys = own.alignments.Budget(10, evaluations=4, num_samples=300).overrides(cell.load(), 5.0)
    assert (keys["iterations"], keys["evaluation.every"], keys["checkpoint.every"]) == (120, 30, 30)
    assert keys["learner.optimizer.decay_steps"] == 240 and keys["evaluation.num_samples"] == 300
    assert "evaluation.num_samples" not in own.alignments.Budget(10).overrides(cell.load(), 5.0)


def test_groups_that_teach_are_those_of_a_cell_s_own_size(own: Any) -> None:
    """24 groups of 8 of which a quarter is silent, then 42 of which 12 are; an evaluation's row says nothing of it."""
    rows = [
        {"throughput/images_per_s": 48.0, "time/iteration_s": 4.0, "zero_std_fraction": 0.25},
        {"eval/x": 1.0},
        {"throughput/images_per_s": 56.0, "time/iteration_s": 6.0, "zero_std_fraction": 2 / 7, "refill/silent": 0.5},
    ]
    for name in own.recipes_cells.REFILL:
        assert own.alignments.groups(rows, own.recipes_cells.REFILL[name].load()) == {
            "silent": pytest.approx((0.25 + 0.5) / 2),
            "taught": pytest.approx((18 + 30) / 2),
        }
    assert own.alignments.groups([], own.recipes_cells.REFILL["without"].load()) == {}


def test_a_learning_rate_is_scaled_from_begin_to_end_of_its_fall(own: Any) -> None:
    cells = own.recipes_cells.TUNE
    rates = [[cells[f"awm_free-rate-{f}"].overrides[key] for key in own.recipes_cells.RATES] for f in ("0.5", "1", "2")]
    assert rates == [[6e-5, 1.5e-5], [1.2e-4, 3e-5], [2.4e-4, 6e-5]]
    assert all(cells[f"awm_free-rate-{f}"].overrides["algorithm.beta"] == 0 for f in ("0.5", "2"))
    twice = own.recipes_cells.screened(cells["nft-rate-2"])["rate_double"]
    assert twice.overrides[own.recipes_cells.RATES[0]] == 2.4e-4


def test_the_committed_cells_are_those_of_the_search_whatever_the_configurations_have_since(own: Any) -> None:
    cells = own.recipes_table.load(own.recipes.OWN / "tune")
    assert cells and all(cell["overrides"] == own.recipes_cells.TUNE[cell["cell"]].overrides for cell in cells)


def test_cells_that_cost_the_same_are_timed_once(own: Any) -> None:
    cost, cells = own.recipes.cost_of, own.recipes_cells.TUNE
    of_awm = {cost(cells[name]) for name in ("awm-rate-1", "awm-rate-2", "awm-beta-1.0", "awm-beta-4.0")}
    assert of_awm == {cost(own.algorithms.CELLS["awm"])}
    assert len({cost(cells[name]) for name in ("awm-rate-1", "awm_free-rate-1", "sft-rate-1", "sft-beta-0.1")}) == 4


def test_what_is_timed_can_name_a_run(own: Any) -> None:
    costs = {own.recipes.cost_of(cell) for search in own.recipes.SEARCHES.values() for cell in search.cells.values()}
    names = {own.cells.slug(cost) for cost in costs}
    assert len(names) == len(costs) and max(map(len, names)) <= 200


def test_seconds_of_algorithms_count_on_their_own_machine_alone(
    own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = {"machine": "a", "cells": {"awm": {"iteration_s": 5.0}, "nft": {"iteration_s": 6.0}, "gone": {}}}
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    monkeypatch.setattr(own.algorithms, "SECONDS", tmp_path / "theirs.json")
    path = tmp_path / "seconds.json"
    for machine, known in (("a", {"nft": 7.0, "awm": 5.0}), ("b", {"nft": 7.0})):
        path.write_text(json.dumps({"machine": machine, "cells": {"nft": {"iteration_s": 7.0}}}))
        assert own.recipes.known_seconds(path) == known


def test_a_file_of_another_run_is_not_taken_for_a_finished_cell(own: Any, tmp_path: Path) -> None:
    cell, budget, refuse = own.recipes_cells.SCREEN["start"], own.alignments.Budget(15), own.cells.refuse_another
    wanted = own.alignments.asked("start", cell, 0, budget)
    refuse(tmp_path / "none.json", wanted)
    (tmp_path / "there.json").write_text(json.dumps({**wanted, "points": []}))
    refuse(tmp_path / "there.json", wanted)
    for key, value in (("minutes", 10), ("base", "another"), ("overrides", {"seed": 1})):
        with pytest.raises(SystemExit, match=rf"there\.json is of another run \({key}(: seed, .*)? differ"):
            refuse(tmp_path / "there.json", {**wanted, key: value})
    del wanted["settings"]  # as cells were written before
    (tmp_path / "there.json").write_text(json.dumps(wanted))
    refuse(tmp_path / "there.json", own.alignments.asked("start", cell, 0, budget))


def test_a_cell_whose_configuration_was_tuned_since_is_another_run(
    own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As nft.yaml, which got a solver of second order after its learning rates had been searched."""
    (tmp_path / "configs").mkdir()
    shipped = (ROOT / "configs" / "shapes" / "nft.yaml").read_text()
    cell, budget, file = own.recipes_cells.TUNE["nft-rate-1"], own.alignments.Budget(10), tmp_path / "nft.yaml"
    monkeypatch.setattr(own.alignments.Cell, "file", file)

    def asked(text: str, name: str = "nft-rate-1") -> dict[str, Any]:
        file.write_text(text)
        return own.alignments.asked(name, own.recipes_cells.TUNE[name], 0, budget)

    now = asked(shipped)
    same = shipped.replace("name: shapes-nft", "name: other").replace("iterations: 160", "iterations: 7 # fewer")
    assert asked(same + "  keep_best: 3\n") == now  # what a budget sets, and where it is kept
    assert asked(shipped.replace("  beta: 1.0 ", "  beta: 1.00 # ")) == now
    before = asked(shipped.replace("  solver: ab2", "  solver: euler"))
    (tmp_path / "there.json").write_text(json.dumps(before))
    with pytest.raises(SystemExit, match=r"of another run \(settings: algorithm\.solver differ\)"):
        own.cells.refuse_another(tmp_path / "there.json", now)
    twice = asked(shipped.replace("learning_rate: 3.0e-5", "learning_rate: 1.0e-9"), "nft-rate-2")
    ends = {**found(own, "nft-rate-1", 0, [0.4, 0.5])}
    folder = written(tmp_path / "tune", [{**ends, **now}, {**ends, **twice}])
    assert len(own.recipes_table.load(folder)) == 2  # every cell has a rate of its own, whatever the file says
    assert cell.overrides.keys() == {*own.recipes_cells.RATES}
    (folder / "nft-rate-1-seed0.json").write_text(json.dumps({**ends, **before}))
    with pytest.raises(SystemExit, match=r"tune has cells of different settings"):
        own.recipes_table.load(folder)


def test_a_cell_that_fails_does_not_end_the_others(
    own: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*command: str) -> None:
        own.cells.flowalign(command, 1, tmp_path / "said.log")
        (tmp_path / "made").write_text("")

    work = {tmp_path / "a.json": partial(run, "check", "none.yaml"), tmp_path / "b.json": partial(run, "--version")}
    assert own.alignments.side_by_side(work, 1) == ["a"] and (tmp_path / "made").is_file()
    said = f"`flowalign check` ended with code 2; {tmp_path / 'said.log'} says why"
    assert json.loads(capsys.readouterr().out) == {"cell": "a", "exit_code": 2, "said": said}


def found(own: Any, name: str, seed: int, scores: list[float]) -> dict[str, Any]:
    """What a run of a cell writes, with these strict scores at its evaluations."""
    rest = {"eval/geneval/overall": 0.7, "eval/pickscore/overall": 9.0}
    tasks = {f"eval/geneval_strict/{task}": 0.5 for task in own.cells.TASKS}
    points = [{"iteration": i, "images": 100 * i, STRICT: score, **rest, **tasks} for i, score in enumerate(scores)]
    rate = 1e-4 if "0.5" in name else 2e-4
    return {"cell": name, "seed": seed, "learning_rate": rate, "iteration_s": 60.0, "points": points}


def written(folder: Path, cells: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    for cell in cells:
        (folder / f"{cell['cell']}-seed{cell['seed']}.json").write_text(json.dumps(cell))
    return folder


def test_the_table_of_a_tuning_has_the_best_cell_and_the_spread(own: Any, tmp_path: Path) -> None:
    ends = {"nft-rate-1": [0.4, 0.9, 0.6], "nft-rate-0.5": [0.4, 0.5, 0.7], "awm-rate-1": [0.4, 0.4, 0.65]}
    ends["nft-beta-0.5"] = [0.4, 0.4, 0.5]
    load = own.recipes_table.load(
        written(tmp_path / "tune", [found(own, name, 0, scores) for name, scores in ends.items()])
    )
    rows = own.recipes_table.tuned(load).splitlines()[2:]
    assert rows[0].startswith("| DiffusionNFT | 0.0001 | 0.700 | 0.700 | 9.00 | 0.50 |")
    assert rows[0].endswith("| 200 | 0.0001: 0.700 (0.700), beta 0.5: 0.500 (0.500), 0.0002: 0.600 (0.900) |")
    assert rows[1].startswith("| AWM | 0.0002 | 0.650 |") and rows[1].endswith("| 0.0002: 0.650 (0.650) |")
    other = own.recipes_table.tuned(
        [found(own, "nft-beta-0.5", 0, [0.4, 0.9]), found(own, "nft-rate-1", 0, [0.4, 0.5])]
    )
    assert other.splitlines()[2].startswith("| DiffusionNFT | 0.0001, beta 0.5 | 0.900 |")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nft-rate-1-seed1", "", r"is no JSON"),
        ("nft-rate-1-seed1", '{"hello": 1}', r"is not what this study writes"),
        ("nft-rate-1-seed0-old", {}, r"holds 'nft-rate-1' with seed 0, which is no cell of that name here"),
        ("gone-seed0", {"cell": "gone"}, r"holds 'gone' with seed 0"),
        ("nft-rate-1-seed1", {"seed": 1, "minutes": 60}, r"has cells of different minutes \((10 and 60|60 and 10)\)"),
        ("nft-rate-1-seed1", {"seed": 1, "base": "b"}, r"has cells of different base"),
    ],
)
def test_what_is_no_cell_of_the_search_or_of_another_budget_is_named_and_in_no_table(
    own: Any, tmp_path: Path, name: str, content: Any, said: str
) -> None:
    cell = {**found(own, "nft-rate-1", 0, [0.4, 0.5]), "minutes": 10, "base": "a"}
    folder = written(tmp_path / "tune", [cell])
    assert own.recipes_table.load(folder) == [cell]
    text = content if isinstance(content, str) else json.dumps({**cell, **content})
    (folder / f"{name}.json").write_text(text)
    with pytest.raises(SystemExit, match=said):
        own.recipes_table.load(folder)


def test_cells_of_other_minutes_are_not_taken_for_those_that_are_asked_for(
    own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own.algorithms, "OWN", tmp_path)
    monkeypatch.setattr(own.algorithms, "SECONDS", tmp_path / "seconds.json")
    asked = SimpleNamespace(minutes=20, seeds=[0], cells=["nft"])
    with pytest.raises(SystemExit, match=r"seconds\.json is missing: `time` or `run` first"):
        own.algorithms.run_cells(asked)
    (tmp_path / "seconds.json").write_text('{"cells": {"nft": {"iteration_s": 5.0}}}')
    wanted = own.alignments.asked("nft", own.algorithms.CELLS["nft"], 0, own.alignments.Budget(20))
    (tmp_path / "nft-seed0.json").write_text(json.dumps({**wanted, "overrides": {"found": "by a search"}}))
    own.algorithms.run_cells(asked)  # which is finished
    tuned = {**wanted["settings"], "learner.optimizer.learning_rate": 1.0}
    for key, value in (("minutes", 10), ("base", "another"), ("settings", tuned)):
        (tmp_path / "nft-seed0.json").write_text(json.dumps({**wanted, key: value}))
        with pytest.raises(SystemExit, match=rf"nft-seed0\.json is of another run \({key}(: learner\..*_rate)? differ"):
            own.algorithms.run_cells(asked)
    asked.cells = ["awm"]
    with pytest.raises(SystemExit, match="has no seconds of awm: `time` first"):
        own.algorithms.run_cells(asked)


def titles(own: Any, search: str) -> dict[str, str]:
    return {name: cell.title for name, cell in own.recipes.SEARCHES[search].cells.items()}


@pytest.mark.parametrize("search", ["tune", "screen", "final", "sft", "soonest"])
def test_the_page_holds_the_committed_searches(own: Any, search: str) -> None:
    found = own.recipes_table.load(own.recipes.OWN / search)
    table = own.recipes_table.table_of(search, found, titles(own, search)) if found else ""
    begin, end = own.recipes_table.MARKS[search]
    page = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    assert f"{begin}\n{table}\n{end}" in page if found else begin not in page


def test_what_gains_soonest_comes_first_with_the_minutes_to_a_fifth(own: Any) -> None:
    cells = [found(own, "nft-rate-0.5", 0, [0.4, 0.5, 0.7]), found(own, "nft-rate-2", 0, [0.4, 0.7, 0.6])]
    rows = [[part.strip() for part in row.split("|")] for row in own.recipes_table.soonest(cells).splitlines()[2:]]
    assert [(row[2], row[-2]) for row in rows] == [("0.0002", "0.7"), ("0.0001", "1.5")]
    assert own.recipes_table.reached([0, 1], [0.4, 0.5], 0.6) is None


def test_the_shipped_quickstart_is_a_cell_of_the_soonest(own: Any) -> None:
    cell, found = own.recipes_cells.SOONEST["nft-rate-2"], own.recipes.OWN / "soonest" / "nft-rate-2-seed0.json"
    budget = own.alignments.Budget(4).overrides(cell.load(), json.loads(found.read_text())["iteration_s"])
    within = own.alignments.Cell(cell.config, "", {**cell.overrides, **budget})
    measured, shipped = (each.load().model_dump() for each in (within, own.alignments.Cell("quickstart", "")))
    for part in ("evaluation", "checkpoint", "name"):  # it is evaluated less often
        del measured[part], shipped[part]
    assert shipped == measured and shipped["iterations"] == 64


def test_the_shipped_hour_is_the_best_recipe(own: Any) -> None:
    cell = own.recipes_cells.SCREEN["weak_clauses"]
    budget = own.alignments.Budget(60, evaluations=12)
    path = own.recipes.OWN / "final" / "weak_clauses-seed0.json"
    seconds = json.loads(path.read_text())["iteration_s"]
    within = own.alignments.Cell(cell.config, "", {**cell.overrides, **budget.overrides(cell.load(), seconds)})
    measured, shipped = (each.load().model_dump() for each in (within, own.alignments.Cell("hour", "")))
    measured["evaluation"]["gold"], measured["checkpoint"]["keep_last"] = [], shipped["checkpoint"]["keep_last"]
    assert shipped.pop("name") and measured.pop("name") and shipped == measured


def test_the_third_learning_rate_lies_on_the_side_of_the_better(own: Any) -> None:
    ends = {"nft-rate-1": 0.7, "nft-rate-2": 0.6, "awm-rate-1": 0.5, "awm-rate-2": 0.55, "sft-rate-1": 0.4}
    assert own.recipes.third_rates(ends) == ["nft-rate-0.5", "awm-rate-4"]
    assert set(own.recipes.third_rates(ends)) <= set(own.recipes_cells.TUNE)


def test_the_best_of_a_search_becomes_the_algorithm_s_cell_and_replaces_none(own: Any, tmp_path: Path) -> None:
    ends = {"nft-rate-1": 0.7, "nft-rate-2": 0.6, "awm-rate-1": 0.5, "awm-rate-2": 0.55}
    written(tmp_path / "tune", [found(own, name, 0, [0.4, end]) for name, end in ends.items()])
    (tmp_path / "awm-seed0.json").write_text('"there"')
    own.recipes.adopt(SimpleNamespace(results=tmp_path), tmp_path)
    taken = json.loads((tmp_path / "nft-seed0.json").read_text())
    assert (taken["cell"], taken["found_as"], taken["points"][-1][STRICT]) == ("nft", "nft-rate-1", 0.7)
    assert (tmp_path / "awm-seed0.json").read_text() == '"there"'


def test_the_best_two_of_a_screening_are_aligned_at_length_and_drawn(own: Any, tmp_path: Path) -> None:
    ends = {"start": (0.5,), "tasks_weak": (0.6, 0.58), "std_none": (0.55,)}
    screen = [
        found(own, name, seed, [0.4, end]) for name, own_ends in ends.items() for seed, end in enumerate(own_ends)
    ]
    written(tmp_path / "screen", screen)
    best = own.recipes.usual("final", SimpleNamespace(results=tmp_path))
    assert best == ["tasks_weak", "std_none"]
    final = written(
        tmp_path / "final", [found(own, name, seed, [0.4, 0.6 + seed / 10]) for name in best for seed in (0, 1)]
    )
    table = own.recipes_table.screened(own.recipes_table.load(final), titles(own, "final"))
    assert table.count("| 2 | 0.650 ± 0.071 | 0.700") == 2
    own.recipes_table.curve(final, tmp_path / "recipes.png")
    assert (tmp_path / "recipes.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_search_that_is_ended_goes_on_where_it_was(own: Any, tmp_path: Path) -> None:
    cost = own.recipes.cost_of(own.recipes_cells.SCREEN["start"])
    seconds = {"machine": own.cells.machine(1), "cells": {cost: {"iteration_s": 10.0}}}
    (tmp_path / "seconds.json").write_text(json.dumps(seconds))
    asked = ["--minutes", "0.01", "--evaluations", "3", "--num-samples", "12", "--threads", "1"]
    places = ["--results", str(tmp_path), "--work-dir", str(tmp_path / "runs")]
    command = [*PROGRAM, "screen", "--cells", "start", *asked, *places]
    rows = tmp_path / "runs" / "screen" / "start-seed0" / "metrics.jsonl"
    first = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not (rows.exists() and rows.read_text().count("\n") >= 2):
        assert first.poll() is None
        time.sleep(0.5)
    first.send_signal(signal.SIGTERM)
    assert "the same command continues" in first.communicate()[1] and first.returncode == 75
    assert not (tmp_path / "screen" / "start-seed0.json").exists()
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["cell"] == "start"
    assert "resuming" in (tmp_path / "runs" / "screen" / "start-seed0.log").read_text()
    cell = json.loads((tmp_path / "screen" / "start-seed0.json").read_text())
    assert [point["iteration"] for point in cell["points"]] == [0, 1, 2, 3]
    assert [point["images"] for point in cell["points"]] == [0, 192, 384, 576]
    again = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert again.stdout == ""
