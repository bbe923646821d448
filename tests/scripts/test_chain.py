"""``scripts/benchmarks/chain.py``: every cell's configurations load, what is kept is counted, a search goes on."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flowalign.config.sections import SHIPPED, ModelConfig
from flowalign.data.banks.latents import LatentBank, load_bank, save_bank
from flowalign.models.build import load_encoders
from flowalign.shapes.prompts import TASKS, evaluation_set, prompts, scene
from flowalign.shapes.render import render

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "scripts" / "benchmarks"
PROGRAM = [sys.executable, str(BENCHMARKS / "chain.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
BASE = SHIPPED / "pipeline"


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the study, which find one another as those of a script do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("cells", "chain", "chain_cells", "chain_students", "chain_table")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def test_the_configurations_of_every_cell_load() -> None:
    done = subprocess.run([*PROGRAM, "check"], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert json.loads(done.stdout) == {"cells": 12, "faults": []}


def test_a_misspelt_key_a_cell_that_changes_nothing_and_a_student_of_more_steps_are_faults(own: Any) -> None:
    start, (eight, four) = own.chain_cells.CELLS["start"], own.chain_cells.CELLS["start"].links
    wrong = replace(four, overrides={**four.overrides, "algorithm.nm_steps": 4})
    cells = {
        "a": start,
        "b": replace(start, links=(wrong,)),
        "c": replace(start, title=""),
        "d": replace(start, links=(eight,)),
    }
    found = list(own.chain.faults(cells))
    assert re.match(r"b: algorithm\.nm_steps: .*num_steps", found[0])
    assert found[1:] == ["c: is the same way as a", "d: ends with a student of 8 steps, not 4"]


def test_a_link_learns_from_the_model_before_it(own: Any) -> None:
    links = own.chain_cells.CELLS["tuned"].links
    keys = links[1].keys(Path("eight"), Path("pairs"), 3)
    assert (keys["model.path"], keys["teacher.path"], keys["latents"], keys["seed"]) == ("eight", "eight", "pairs", 3)
    last = links[2].load(BASE, None)
    assert (last.algorithm["num_steps"], last.algorithm["grid"], last.evaluation.grid) == (4, "paper", "paper")


def test_cells_that_begin_alike_share_what_they_make(own: Any) -> None:
    cells, place = own.chain_cells.CELLS, own.chain_cells.place_of

    def made(name: str, count: int, seed: int = 0) -> str:
        return place(cells[name].bank, cells[name].links[:count], seed)

    assert made("start", 2) == made("tuned", 2) and made("long", 1) == made("long_tuned", 1)
    others = [("start", 1), ("start", 2), ("start", 2, 1), ("pairs", 2), ("right", 2), ("rate", 2)]
    assert len({made(*one) for one in others}) == len(others)


def test_a_trial_is_recorded_as_another_way(own: Any) -> None:
    whole = own.chain_cells.CELLS["tuned"]
    trial = whole.shortened(64, 3)
    assert trial.bank.pairs == 64 and trial.plain != whole.plain and whole.shortened(None, None).plain == whole.plain
    lengths = [link.overrides.get("phases.0.iterations", link.overrides.get("iterations")) for link in trial.links]
    assert lengths == [3, 3, 3]
    assert list(own.chain.faults({"trial": trial})) == []
    assert own.chain_cells.CELLS["tuned_alone"].shortened(64, None).bank is None


def verdicts(rights: dict[str, int], count: int) -> str:
    """Verdicts on an evaluation in which the first so many images of each task are right."""
    turn = dict.fromkeys(TASKS, 0)
    said = []
    for row in evaluation_set(count):
        said.append("1" if turn[row["tag"]] < rights[row["tag"]] else "0")
        turn[row["tag"]] += 1
    return "".join(said)


def test_a_share_is_that_of_the_gain(own: Any) -> None:
    kept = own.chain_table.kept
    base, aligned = verdicts(dict.fromkeys(TASKS, 2), 60), verdicts(dict.fromkeys(TASKS, 10), 60)
    assert kept(base, aligned, aligned) == {"share": 1.0, "interval": [1.0, 1.0]}
    assert kept(base, aligned, base) == {"share": 0.0, "interval": [0.0, 0.0]}
    # 4, 4, 4, 4, 4 and 10 of 10: (0.5 - 0.2) / (1 - 0.2)
    found = kept(base, aligned, verdicts(dict.fromkeys(TASKS, 4) | {"position": 10}, 60))
    assert found["share"] == pytest.approx(0.375) and found["interval"][0] < 0.375 < found["interval"][1]


def test_an_interval_holds_the_true_share_as_often_as_it_says(own: Any) -> None:
    """Base, aligned model and student right in 45, 72 and 66 of 100, student and aligned model mostly on the same."""
    generator, held, count = np.random.default_rng(0), 0, 150
    for _ in range(count):
        base, aligned, other = (generator.random(600) < share for share in (0.45, 0.72, 0.52))
        student = np.where(generator.random(600) < 0.7, aligned, other)
        said = ("".join(map(str, verdicts.astype(int))) for verdicts in (base, aligned, student))
        low, high = own.chain_table.kept(*said, 400)["interval"]
        held += low <= (0.66 - 0.45) / (0.72 - 0.45) <= high
    assert 0.88 <= held / count <= 0.99


def test_what_is_resampled_is_prompts(own: Any) -> None:
    """As many right images as before, but those of a prompt all alike: an image more says nothing new."""
    rows = evaluation_set(1200)
    base, aligned = "0" * 1200, "1" * 1200
    generator, alike = np.random.default_rng(0), {row["prompt"]: i % 2 for i, row in enumerate(prompts("eval"))}
    together = "".join(str(alike[row["prompt"]]) for row in rows)
    apart = "".join(generator.permutation(list(together)))
    widths = [np.diff(own.chain_table.kept(base, aligned, student)["interval"])[0] for student in (together, apart)]
    assert widths[0] > 2 * widths[1]


def test_no_gain_has_no_share_and_a_doubtful_one_no_interval(own: Any) -> None:
    kept, claim = own.chain_table.kept, own.chain_table.claim
    base = verdicts(dict.fromkeys(TASKS, 5), 60)
    assert kept(base, base, base) is None
    found = kept(base, verdicts(dict.fromkeys(TASKS, 5) | {"position": 6}, 60), base)
    assert found == {"share": 0.0, "interval": None}
    ends = ([0.9, 1.1], [0.7, 0.89], [0.8, 1.0])
    assert [claim({"share": 0, "interval": interval}) for interval in ends] == ["yes", "no", "open"]
    assert claim(None) == claim(found) == "open"


def test_a_bank_is_left_with_the_pairs_whose_picture_is_right(own: Any, tmp_path: Path) -> None:
    """True scenes of twelve prompts, every second one with the prompt after its own; the noise tells them apart."""
    rng, rows = np.random.default_rng(0), prompts("train", "color_attr")[::60][:12]
    images = torch.from_numpy(np.stack([render(scene(row, rng), rng) for row in rows]))
    latents = load_encoders(ModelConfig(path=str(BASE)), text=False).encode_images(images)
    noise = torch.arange(12.0).view(12, 1, 1, 1).expand_as(latents)
    said = torch.tensor([i + i % 2 for i in range(12)]).clamp_max(10)
    save_bank(tmp_path / "pairs", LatentBank(latents, said, [row["prompt"] for row in rows], noise))
    own.chain_students.keep_right(tmp_path / "pairs", tmp_path / "right", BASE, 1)
    (shard,) = load_bank(tmp_path / "right").shards
    assert shard.noise is not None
    kept = shard.noise[:, 0, 0, 0].int().tolist()
    assert set(kept) <= {0, 2, 4, 6, 8, 10} and len(kept) >= 4
    assert shard.rows["original"].tolist() == kept
    assert torch.equal(shard.latents, latents.half()[kept])


def test_nothing_is_begun_once_a_search_is_to_end(own: Any, tmp_path: Path) -> None:
    """Whoever waited for what another cell makes finds it not there when that one has ended."""
    students, options = own.chain_students, SimpleNamespace(threads=1)
    students.ENDING.set()
    try:
        for cell in (own.chain_cells.CELLS["start"], own.chain_cells.CELLS["tuned_alone"]):
            with pytest.raises(KeyboardInterrupt):
                students.made_student(cell, tmp_path / "aligned-model", 0, options)
        with pytest.raises(KeyboardInterrupt):
            students.exported(tmp_path / "run", tmp_path / "model", 1)
    finally:
        students.ENDING.clear()
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock"}


def cell(own: Any, name: str, right: int, seed: int = 0) -> dict[str, Any]:
    """What a finished cell writes of a student that is right in so many of ten images of each task."""
    scores = {"geneval": right / 10, "fid": 4.25, "right": verdicts(dict.fromkeys(TASKS, right), 60)}
    cost = {"pairs": 8000, "latents": 102400, "images": 0, "seconds": 630}
    who = {"cell": name, "seed": seed, "base": "today", "aligned": "a", "num_samples": 60}
    return {**who, "cost": cost, "scores": {"4": scores, "10": scores}}


def test_the_table_has_the_best_student_first_and_says_what_it_keeps(own: Any, tmp_path: Path) -> None:
    for one in (cell(own, "start", 8), cell(own, "long", 10), cell(own, "long", 2, 1)):
        (tmp_path / f"{one['cell']}-seed{one['seed']}.json").write_text(json.dumps(one))
    models = {"base": cell(own, "", 2)["scores"], "aligned": cell(own, "", 10)["scores"]}
    reference = {**cell(own, "", 2), "scores": models}
    (tmp_path / "reference-seed0.json").write_text(json.dumps(reference))
    head, _, table = own.chain_table.markdown(tmp_path).partition("\n\n")
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert head == "Seed 0, 60 images of each model and number of steps:"
    assert [row[0].partition(":")[0] for row in rows] == ["base", "aligned", "`long`", "`start`"]
    best = ["1.000", "100%", "100% to 100%", "yes", "1.000", "100%", "4.2", "8,000", "102,400", "–"]
    assert rows[2][1:] == best
    assert rows[3][2] == "75%" and rows[3][4] in ("no", "open") and rows[0][2] == "0%"


@pytest.mark.parametrize("key", ["base", "aligned", "num_samples"])
@pytest.mark.parametrize("name", ["reference", "start"])
def test_students_of_another_model_are_in_no_table(own: Any, tmp_path: Path, name: str, key: str) -> None:
    scores = {"base": cell(own, "", 2)["scores"], "aligned": cell(own, "", 10)["scores"]}
    made = {"start": cell(own, "start", 8), "long": cell(own, "long", 8)}
    made["reference"] = {**cell(own, "", 2), "scores": scores}
    made[name][key] = "other"
    for title, one in made.items():
        (tmp_path / f"{title}-seed0.json").write_text(json.dumps(one))
    with pytest.raises(SystemExit, match=f"has cells of different {key}"):
        own.chain_table.markdown(tmp_path)


def test_half_a_file_of_a_student_is_named(own: Any, tmp_path: Path) -> None:
    (tmp_path / "start-seed0.json").write_text(json.dumps(cell(own, "start", 8))[:-9])
    with pytest.raises(SystemExit, match=r"start-seed0\.json is no JSON"):
        own.chain_table.markdown(tmp_path)


def test_the_page_holds_the_committed_students(own: Any) -> None:
    begin, end = own.chain_table.MARKS
    table = own.chain_table.markdown(own.chain.OWN)
    assert table and f"{begin}\n{table}\n{end}" in own.chain_table.PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_search_that_is_ended_goes_on_where_it_was_and_takes_no_other_s_cells(own: Any, tmp_path: Path) -> None:
    few = {"iterations": 1, "data.groups_per_iteration": 2, "evaluation.num_samples": 6, "evaluation.every": 0}
    few |= {"checkpoint.every": 1, "checkpoint.best_metric": "reward/total/mean"}
    aligned = own.cells.align("flow_grpo", few, 1, tmp_path, "aligned")
    asked = ["--pairs", "96", "--steps", "3", "--num-samples", "12", "--threads", "1", "--cells", "straight"]
    places = ["--aligned", str(aligned), "--results", str(tmp_path / "found"), "--work-dir", str(tmp_path / "runs")]
    command = [*PROGRAM, "run", *asked, *places]
    work = tmp_path / "runs" / own.chain_students.weights_of(aligned)
    first = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not list(work.glob("progressive-*.log")):
        assert first.poll() is None
        time.sleep(0.5)
    first.send_signal(signal.SIGTERM)
    assert "the same command continues" in first.communicate()[1] and first.returncode == 75
    cell, reference = (tmp_path / "found" / f"{name}-seed0.json" for name in ("straight", "reference"))
    said = {path: path.read_bytes() for path in (reference, *work.glob("pairs-*.log"))}
    assert len(said) == 2 and not cell.exists()
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["cell"] == "straight"
    assert all(path.read_bytes() == content for path, content in said.items())
    found = json.loads(cell.read_text())
    assert [found["cost"][key] for key in ("pairs", "latents", "images")] == [96, 384, 0]
    assert all(len(found["scores"][steps]["right"]) == 12 for steps in ("4", "10"))
    assert subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout == ""
    for path, key in ((cell, "base"), (cell, "aligned"), (reference, "aligned")):
        content = path.read_text()
        path.write_text(json.dumps({**json.loads(content), key: "another"}))
        refused = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert refused.returncode == 1 and f"{path.name} is of another run ({key} differ)" in refused.stderr
        path.write_text(content)
