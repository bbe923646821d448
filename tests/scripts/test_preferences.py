"""``scripts/benchmarks/preferences.py``: all configurations load, and what a search keeps, refuses and prints."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flowalign.intake.file import load_align
from flowalign.shapes.prompts import evaluation_set

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "scripts" / "benchmarks"
PROGRAM = [sys.executable, str(BENCHMARKS / "preferences.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the study, which find one another as those of a script do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("alignments", "cells", "preferences", "preferences_cells", "preferences_table")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def test_the_configuration_of_every_cell_loads(own: Any) -> None:
    done = subprocess.run([*PROGRAM, "check"], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert said == {"cells": len(own.preferences_cells.CELLS), "kinds": list(own.preferences_cells.KINDS), "faults": []}


def test_the_start_is_what_the_configuration_says_and_each_cell_differs_from_it(own: Any) -> None:
    cells = own.preferences_cells.CELLS
    start = cells["start"]
    assert start.overrides == {"iterations": 150} and start.pairs == "any"
    config = start.load()
    assert (config.learner.optimizer.learning_rate, config.algorithm["beta"]) == (3e-5, 100)
    rates = [cells[f"rate_{factor}"].load().learner.optimizer.learning_rate for factor in ("0.5", "2", "4")]
    assert rates == [1.5e-5, 6e-5, 1.2e-4]
    optimizer = cells["fast_falling"].load().learner.optimizer
    assert [optimizer.learning_rate_at(step) for step in (150, 300)] == pytest.approx([7.5e-5, 3e-5])
    several = {"fast_falling", "fast_two"}
    for name, cell in cells.items():
        differs = [key for key, value in cell.overrides.items() if start.overrides.get(key) != value]
        varied = {key.removesuffix("_params") for key in differs} | ({"pairs"} if cell.pairs != start.pairs else set())
        assert min(len(varied), 2) == (0 if cell is start else 2 if name in several else 1), name
    assert start.of(7).overrides == {"iterations": 7} and start.of(None) is start


def test_the_shipped_configuration_is_the_best_that_was_measured(own: Any) -> None:
    """With the pairs that its first lines and docs/algorithms.md make."""
    best = next(iter(own.preferences_table.load(own.preferences.OWN).values()))[0]
    shipped = load_align(ROOT / "configs" / "shapes" / "dpo.yaml", ["learner.engine=torch"], require_files=False).config
    left_out = ("data.preferences", *own.preferences.UNWATCHED)
    assert own.alignments.settings(shipped, left_out) == best["settings"]
    asked = f"--group-size {best['pairs']['group_size']} --pairs {best['pairs']['count']} --out preferences/shapes"
    for page in ("configs/shapes/dpo.yaml", "docs/algorithms.md"):
        assert asked in (ROOT / page).read_text()


def test_pairs_of_another_kind_are_not_taken_for_a_kind_s(own: Any, tmp_path: Path) -> None:
    options = Namespace(work_dir=tmp_path, pairs=8)
    card = {"reward": {}, "prompts": "shapes:train", "num_steps": 10, "guidance_scale": 1.0, "seed": 0, "pairs": 8}
    card |= {"groups": 9, "groups_without_pair": 1, "why_without_pair": {}, "group_size": 8}
    for kind in ("any", "clear"):
        folder = own.preferences.pairs_dir(kind, options)
        folder.mkdir(parents=True)
        (folder / "preferences.json").write_text(json.dumps(card))
    assert own.preferences.card_of("any", options)["groups"] == 9
    with pytest.raises(SystemExit, match=r"clear-8 is not of Kind\(group_size=8, min_difference=1\.0\)"):
        own.preferences.card_of("clear", options)


def test_a_file_of_another_run_is_not_taken_for_a_finished_cell(own: Any, tmp_path: Path) -> None:
    there = Namespace(pairs=2000, samples=1200, results=tmp_path, iterations=None, work_dir=tmp_path / "work", jobs=1)
    wanted = own.preferences.asked("start", own.preferences_cells.CELLS["start"], 0, there)
    assert wanted["base"] == own.alignments.base_digest()
    file = tmp_path / "start-seed0.json"
    file.write_text(json.dumps(wanted))
    own.preferences.run_cells(["start"], [0], there)  # is finished, so nothing runs
    assert not there.work_dir.exists()
    kinds = {"kind": "any", "count": 2000, "group_size": 4, "min_difference": 0.0}
    for key, value in (("base", "another"), ("samples", 12), ("overrides", {}), ("pairs", kinds)):
        file.write_text(json.dumps({**wanted, key: value}))
        with pytest.raises(SystemExit, match=rf"start-seed0\.json is of another run \({key}(: \w+)? differ"):
            own.preferences.run_cells(["start"], [0], there)


def test_models_are_judged_as_the_configuration_evaluates_and_by_what_no_pair_has_seen(
    own: Any, tmp_path: Path
) -> None:
    judge = load_align(own.preferences.write_judge(Namespace(work_dir=tmp_path, threads=1)), require_files=False).config
    assert [scorer.label for scorer in judge.evaluation.judges] == ["pickscore", "geneval"]
    config = own.preferences_cells.CELLS["start"].load()
    assert judge.model == config.model and judge.evaluation.weights == "ema"
    other = {"scorer", "gold", "every"}
    assert judge.evaluation.model_dump(exclude=other) == config.evaluation.model_dump(exclude=other)


def judged(folder: Path, scores: list[float]) -> Path:
    """What `flowalign evaluate --out` writes, with these scores."""
    folder.mkdir()
    rows = [{"filename": f"{i:05d}.png", "prompt": "a star", "score": score} for i, score in enumerate(scores)]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_sample_is_won_where_the_aligned_model_s_image_is_rated_higher(own: Any, tmp_path: Path) -> None:
    before, after = judged(tmp_path / "a", [1.0, 2.0, 3.0]), judged(tmp_path / "b", [1.5, 2.0, 2.9])
    assert own.preferences.outcomes(before, after) == "+=-"
    shuffled = judged(tmp_path / "c", [1.5, 2.0, 2.9])
    rows = (shuffled / "results.jsonl").read_text().splitlines()
    (shuffled / "results.jsonl").write_text("\n".join(rows[::-1]) + "\n")
    with pytest.raises(SystemExit, match="c has other samples than"):
        own.preferences.outcomes(before, shuffled)


def test_an_interval_holds_the_rate_and_narrows_with_prompts_not_with_samples_or_seeds(own: Any) -> None:
    interval, generator = own.preferences_table.interval, np.random.default_rng(0)
    prompts = [row["prompt"] for row in evaluation_set(1200)]
    of_prompt = {prompt: generator.integers(0, 2) for prompt in dict.fromkeys(prompts)}
    together = np.array([[float(of_prompt[prompt]) for prompt in prompts]])  # a prompt is won or lost as a whole
    apart = generator.permutation(together[0])[None]
    (low, high), (near, far) = interval(together), interval(apart)
    assert (low + high) / 2 == pytest.approx(together.mean()) and far - near == pytest.approx(
        2 * 1.96 * 0.0144, rel=0.1
    )
    assert high - low > 2 * (far - near)
    assert interval(apart.repeat(3, 0)) == pytest.approx((near, far))  # the same again: nothing more is known
    assert np.isnan(interval(apart[:, :6])).all()  # one prompt of each task


def test_an_interval_holds_the_true_rate_as_often_as_it_says(own: Any) -> None:
    """Of models that win each prompt at a rate of its own, of many such models."""
    generator, prompts = np.random.default_rng(0), [row["prompt"] for row in evaluation_set(1200)]
    names, place = np.unique(prompts, return_inverse=True)
    held = []
    for _ in range(200):
        rate = generator.beta(1, 1, len(names))[place]
        low, high = own.preferences_table.interval((generator.random(1200) < rate)[None].astype(float))
        held.append(low <= 0.5 <= high)
    assert 0.89 <= np.mean(held) <= 0.99


def written(own: Any, folder: Path, name: str, seed: int, won: str, strict: float) -> None:
    """What a run of a cell writes."""
    metrics = {own.cells.STRICT: strict, own.cells.OFFICIAL: 0.7, own.cells.GOLD: 9.0}
    errors = {"standard_error/geneval_strict/overall": 0.014}
    cell = {"cell": name, "seed": seed, "outcomes": won, "metrics": metrics, "standard_errors": errors}
    cell |= {"base": "today", "samples": len(won), "pairs": {"count": 8}, "overrides": {}}
    cell |= {"learned": {"dpo/implicit_accuracy": 0.75}, "iteration_s": 4.0}
    (folder / f"{name}-seed{seed}.json").write_text(json.dumps(cell))


def test_the_table_has_the_cells_by_their_win_rate_beside_the_base(own: Any, tmp_path: Path) -> None:
    errors = {"standard_error/geneval_strict/overall": 0.015}
    metrics = {own.cells.STRICT: 0.4, own.cells.OFFICIAL: 0.65, own.cells.GOLD: 8.5}
    base = {"base": "today", "samples": 24, "metrics": metrics, "standard_errors": errors}
    (tmp_path / "base.json").write_text(json.dumps(base))
    written(own, tmp_path, "start", 0, "+-=+" * 6, 0.5)
    written(own, tmp_path, "rate_4", 0, "+++-" * 6, 0.5)
    written(own, tmp_path, "rate_4", 1, "++++" * 6, 0.6)
    rows = own.preferences_table.markdown(tmp_path).splitlines()[2:]
    assert rows[0] == "| base |  |  |  |  |  | 0.400 ± 0.015 | 0.650 | 8.50 |  |"
    assert rows[1].startswith("| learning rate × 4 | 2 | 87.5 | ") and rows[1].endswith(
        " | 75.0, 100.0 | 0.0 | 0.550 ± 0.014 | 0.700 | 9.00 | 0.75 |"
    )
    start = np.array([[1, 0, 0.5, 1] * 6])
    low, high = (f"{100 * end:.1f}" for end in own.preferences_table.interval(start))
    assert rows[2].startswith(f"| start | 1 | 62.5 | {low} to {high} |  | 25.0 | 0.500")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("rate_4-seed0", {"base": "other"}, "has cells of different base"),
        ("rate_4-seed0", {"samples": 12}, "has cells of different samples"),
        ("rate_4-seed0", {"pairs": {"count": 9}}, "has cells of different pairs"),
        ("rate_4-seed0", {"settings": {"algorithm.beta": 5}}, "has cells of different settings"),
        ("base", {"base": "other"}, "has cells of different base"),
        ("rate_4-seed0", {"cell": "gone"}, "which is no cell of that name here"),
        ("rate_4-seed0", None, "is no JSON"),
    ],
)
def test_cells_that_cannot_stand_in_one_table_are_named(
    own: Any, tmp_path: Path, name: str, change: dict[str, Any] | None, said: str
) -> None:
    for cell in ("start", "rate_4"):
        written(own, tmp_path, cell, 0, "+-=+" * 6, 0.5)
        file = tmp_path / f"{cell}-seed0.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "settings": {"algorithm.beta": 100}}))
    base = {**json.loads(file.read_text()), "samples": 24}
    (tmp_path / "base.json").write_text(json.dumps(base))
    assert own.preferences_table.markdown(tmp_path).count("\n") == 4
    file = tmp_path / f"{name}.json"
    file.write_text("{" if change is None else json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(SystemExit, match=said):
        own.preferences_table.markdown(tmp_path)


def test_the_page_holds_the_committed_cells(own: Any) -> None:
    begin, end = own.preferences_table.MARKS
    table = own.preferences_table.markdown(own.preferences.OWN)
    assert table.count("\n") > 2 and f"{begin}\n{table}\n{end}" in own.preferences_table.PAGE.read_text(
        encoding="utf-8"
    )


@pytest.mark.slow
def test_a_search_that_is_ended_goes_on_where_it_was(own: Any, tmp_path: Path) -> None:
    asked = ["--pairs", "8", "--samples", "12", "--iterations", "4", "--threads", "1"]
    places = ["--results", str(tmp_path), "--work-dir", str(tmp_path / "work")]
    command = [*PROGRAM, "search", "--cells", "start", *asked, *places]
    work = tmp_path / "work" / own.alignments.base_digest()
    half = work / "pairs" / "any-8.part"
    half.mkdir(parents=True)
    (half / "pairs-00000.parquet").write_bytes(b"half")  # of a command that was killed
    rows = work / "runs" / "start-seed0" / "metrics.jsonl"
    first = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not (rows.exists() and rows.read_text().count("\n") >= 2):
        assert first.poll() is None
        time.sleep(0.5)
    first.send_signal(signal.SIGTERM)
    assert "the same command continues" in first.communicate()[1] and first.returncode == 75
    assert not half.exists() and not (tmp_path / "start-seed0.json").exists()
    once = [work / "pairs" / "any-8" / "preferences.json", work / "judged" / "base-12" / "metrics.json"]
    made = [path.stat().st_mtime_ns for path in once]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["cell"] == "start"
    assert "resuming" in (work / "runs" / "start-seed0.log").read_text()
    assert [path.stat().st_mtime_ns for path in once] == made
    cell, base = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("start-seed0", "base"))
    assert len(cell["outcomes"]) == 12 and cell["made"]["pairs"] == 8
    assert cell["metrics"].keys() == base["metrics"].keys() >= {own.cells.STRICT, own.cells.OFFICIAL, own.cells.GOLD}
    again = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert again.stdout == ""
    table = subprocess.run([*PROGRAM, "table", *places], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert "| start | 1 | " in table.stdout
