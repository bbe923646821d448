"""Preference pairs that are a least difference apart: those of the default set that are, and the same bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.config.section import ConfigError
from flowalign.config.sections import SHIPPED, RewardConfig
from flowalign.data.preferences import PreferencesError
from flowalign.making.preferences import EQUAL, NEAR, make_preferences
from flowalign.samples.sampled import sampled_model
from tests.tiny import run_config

CARD = "preferences.json"
GENEVAL = RewardConfig(spec="geneval", options={"mode": "partial", "detector": "palette"})


def made(model: Path, reward: RewardConfig, out: Path, **asked: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Make a set; return its rows, and the card as it lies on disk."""
    walked = sampled_model(model, run_config(model), num_steps=4, seed=0)
    make_preferences(walked, reward, out, **{"prompts": "shapes:train", "group_size": 4, **asked})
    rows = [row for file in sorted(out.glob("*.parquet")) for row in pyarrow.parquet.read_table(file).to_pylist()]
    return rows, json.loads((out / "preferences.json").read_text())


def difference(row: dict[str, Any]) -> float:
    winner = int(row["label_1"] > row["label_0"])
    return row[f"score_{winner}"] - row[f"score_{1 - winner}"]


def scored(folder: Path, scores: list[float]) -> RewardConfig:
    """A reward of a file that gives the images of a group these scores."""
    source = f"def given(images, prompts, metadata):\n    return ({scores} * len(images))[: len(images)]\n"
    (folder / "given.py").write_text(source)
    return RewardConfig(spec=f"{folder / 'given.py'}:given")


def test_pairs_that_are_far_enough_apart_are_those_of_all_pairs_that_are(tmp_path: Path) -> None:
    every, card = made(SHIPPED / "pipeline", GENEVAL, tmp_path / "every", pairs=16)
    clear = [row for row in every if difference(row) >= 0.5]
    assert 0 < len(clear) < len(every)
    rows, own = made(SHIPPED / "pipeline", GENEVAL, tmp_path / "clear", pairs=len(clear), min_difference=0.5)
    assert rows == clear
    assert own["min_difference"] == 0.5 and "min_difference" not in card
    why = own["why_without_pair"]
    assert 0 < why[NEAR] <= len(every) - len(clear) and NEAR not in card["why_without_pair"]
    assert own["groups"] - own["groups_without_pair"] - own["pairs_beyond"] == len(clear)
    assert set(why) <= {NEAR, EQUAL}


@pytest.mark.parametrize(("scores", "least"), [([0.9, 0.8], 0.1), ([100.3, 100.0], 0.3), ([0.3, 0.0], 0.3)])
def test_scores_that_are_exactly_so_far_apart_are_far_enough(
    tiny_pipeline_dir: Path, tmp_path: Path, scores: list[float], least: float
) -> None:
    asked = {"pairs": 2, "group_size": 2, "min_difference": least}
    rows, card = made(tiny_pipeline_dir, scored(tmp_path, scores), tmp_path / "made", **asked)
    assert len(rows) == 2 and card["groups_without_pair"] == 0


def test_groups_that_are_too_near_are_counted_and_named_where_there_are_no_others(
    tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    said = r"tells too few of them apart by 0\.11; choose a finer one, a smaller difference or larger groups"
    with pytest.raises(PreferencesError, match=said):
        asked = {"pairs": 1, "group_size": 2, "min_difference": 0.11}
        made(tiny_pipeline_dir, scored(tmp_path, [0.9, 0.8]), tmp_path / "made", **asked)
    assert not (tmp_path / "made").exists()


class Killed(Exception):
    pass


def kill_at(most: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= most:
            raise Killed

    return progress


def files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# Batches are of two groups: a file ends within a batch, at its end, and several end in one.
@pytest.mark.parametrize(("shard_size", "stops"), [(3, (3, 6, 7)), (4, (5,)), (1, (2, 4)), (5, (4,))])
def test_an_interrupted_set_goes_on_to_the_same_bytes(
    tiny_pipeline_dir: Path, tmp_path: Path, shard_size: int, stops: tuple[int, ...]
) -> None:
    reward = scored(tmp_path, [0.9, 0.8])
    asked = {"pairs": 9, "group_size": 4, "shard_size": shard_size}
    made(tiny_pipeline_dir, reward, tmp_path / "whole", **asked)
    for most in stops:
        with pytest.raises(Killed):
            made(tiny_pipeline_dir, reward, tmp_path / "broken", **asked, progress=kill_at(most))
    kept = [path.name for path in (tmp_path / "broken").glob("*.parquet")]
    assert len(kept) == {3: 2, 4: 1, 1: 4, 5: 0}[shard_size]
    made(tiny_pipeline_dir, reward, tmp_path / "broken", **asked)
    assert files(tmp_path / "broken") == files(tmp_path / "whole")
    assert set(files(tmp_path / "whole")) == {*(f"pairs-{i:05d}.parquet" for i in range(-(-9 // shard_size))), CARD}


def test_an_interrupted_set_goes_on_with_the_options_that_it_was_begun_with(
    tiny_pipeline_dir: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"pairs": 6, "group_size": 4, "shard_size": 2}
    reward, out = scored(tmp_path, [0.9, 0.8]), tmp_path / "made"
    with pytest.raises(Killed):
        made(tiny_pipeline_dir, reward, out, **asked, progress=kill_at(2))
    before = files(out)
    with pytest.raises(ConfigError, match=r"was begun with pairs 6, now it is 7; give the same options to continue"):
        made(tiny_pipeline_dir, reward, out, **{**asked, "pairs": 7})
    with pytest.raises(ConfigError, match=r"was begun with files"):
        made(tiny_pipeline_dir, scored(tmp_path, [0.7, 0.8]), out, **asked)  # the same file, another content
    reward = scored(tmp_path, [0.9, 0.8])
    assert files(out) == before
    (out / ".preferences" / "reached.json").unlink()  # killed between a file and its note
    made(tiny_pipeline_dir, reward, out, **asked)
    with pytest.raises(ConfigError, match="holds parquet files already"):
        made(tiny_pipeline_dir, reward, out, **asked)


@pytest.mark.parametrize("least", [-0.1, math.nan, math.inf])
def test_what_is_no_difference_is_refused_before_anything_is_made(
    tiny_pipeline_dir: Path, tmp_path: Path, least: float
) -> None:
    with pytest.raises(ConfigError, match=r"^--min-difference: .* is no difference of scores"):
        made(tiny_pipeline_dir, GENEVAL, tmp_path / "made", pairs=1, min_difference=least)
    asked = ["make-preferences", str(tiny_pipeline_dir), "--reward", "geneval", "--out", str(tmp_path / "made")]
    assert CliRunner().invoke(app, [*asked, "--min-difference", str(least)]).exit_code == 2
    assert not (tmp_path / "made").exists()


def test_a_difference_beyond_the_range_of_the_scores_is_refused(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no two scores of 'geneval' differ by 1\.5: they are from 0 to 1"):
        made(tiny_pipeline_dir, GENEVAL, tmp_path / "made", pairs=1, min_difference=1.5)
    assert not (tmp_path / "made").exists()


def test_the_command_takes_a_least_difference(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    reward = scored(tmp_path, [4.0, 1.0])
    asked = ["make-preferences", str(tiny_pipeline_dir), "--reward", reward.spec, "--pairs", "1", "--num-steps", "1"]
    asked += ["--group-size", "2", "--min-difference", "3", "--out", str(tmp_path / "made")]
    done = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "made" / "preferences.json").read_text())["min_difference"] == 3
