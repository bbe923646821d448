"""A run's prompts in other forms than JSON Lines: what a configuration may ask of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.intake.file import load_align, read_yaml
from flowalign.intake.given_prompts import given_prompts
from flowalign.intake.resolved import write_resolved
from flowalign.run.made.ingredients import parts_of
from tests.tiny import write_configs_of_a_pipeline

CONFIG = """
name: mine
iterations: 1
model: {path: model, max_sequence_length: 16}
data: {prompts: prompts.txt}
algorithm: {type: flow_grpo}
rewards: [reward.py:bright]
evaluation: {every: 0}
"""
REWARD = """
def bright(images, prompts, metadata):
    return {"bright": images.mean((1, 2, 3))}


class Near:
    needs = {"references"}

    def answer(self, asked):
        return {"Near": [float(picture.mean()) for picture in asked.references]}
"""
NEGATIVE = "columns: {prompt: caption, negative_prompt: without}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("mine")
    write_configs_of_a_pipeline(here / "model")
    (here / "run.yaml").write_text(CONFIG)
    (here / "reward.py").write_text(REWARD)
    (here / "prompts.txt").write_text("a red dog\ntwo cats\n")
    (here / "captions.csv").write_text("caption,kind,without,picture\na dog,x,blurry,0.png\na cat,y,,0.png\n")
    (here / "led.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "negative_prompt": "bad"}\n')
    (here / "pictured.jsonl").write_text('{"prompt": "a", "image": "0.png"}\n{"prompt": "b", "image": "1.png"}\n')
    Image.new("RGB", (4, 6), "red").save(here / "0.png")
    return here


def load(folder: Path, *overrides: str) -> AlignConfig:
    return load_align(folder / "run.yaml", list(overrides)).config


def test_a_text_stays_a_text_and_a_section_has_an_absolute_source(folder: Path, tmp_path: Path) -> None:
    config = load(folder)
    assert config.data.prompts == str(folder / "prompts.txt") and config.evaluation.prompts == "shapes:eval"
    written = write_resolved(config, tmp_path / "mine")
    assert yaml.safe_load(written.read_text())["data"]["prompts"] == str(folder / "prompts.txt")
    asked = load(
        folder, "data.prompts={source: captions.csv, columns: {prompt: caption, task: kind}, where: {kind: x}}"
    )
    written = write_resolved(asked, tmp_path / "mine")
    assert AlignConfig.model_validate(read_yaml(written)).data.prompts == asked.data.prompts
    assert str(asked.data.prompts) == f"{folder / 'captions.csv'} (prompt is caption, task is kind, where kind is x)"


def test_a_run_is_made_of_the_files_of_its_prompts_by_the_key_that_names_them(folder: Path, tmp_path: Path) -> None:
    asked = "data.prompts={source: captions.csv, columns: {prompt: caption}}"
    found = {
        overrides: [
            (part.key, part.path) for part in parts_of(load(folder, *overrides), folder) if "prompts" in part.key
        ]
        for overrides in ((), (asked,))
    }
    assert found[()] == [("data.prompts", folder / "prompts.txt")]
    assert found[(asked,)] == [("data.prompts.source", folder / "captions.csv")]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rewards=[geneval]"], r"data\.prompts: .*prompts\.txt, line 1: has no `tag`; geneval needs rows"),
        (["data.prompts=captions.csv"], r"data\.prompts: .*captions\.csv has no column 'prompt'; it has caption, kind"),
        (
            ["data.prompts={source: captions.csv, column: {}}"],
            r"data\.prompts\.column: unknown key; did you mean data\.p",
        ),
        (["data.prompts={columns: {prompt: a}}"], r"data\.prompts\.source: is missing"),
        (["data.prompts="], r"data\.prompts: is empty; name a source of prompts"),
        (["data.prompts={source: ' '}"], r"data\.prompts\.source: is empty; name a source of prompts"),
        (["model.path="], r"model\.path: is empty; name the directory of a model"),
        (
            ["data.prompts={source: led.jsonl, columns: {prompt: null}}"],
            r"\.columns\.prompt: is null, and",
        ),
        (["data.task_weights={x: 1}"], r"data\.task_weights: no prompt has the task 'x'; the prompts have no tasks"),
        (["rewards=[{spec: 'reward.py:bright', tasks: [x]}]"], r"rewards\.0\.tasks: .* they have no tasks"),
        (["data.prompts=[a]"], r"data\.prompts: got \['a'\]; write a text"),
        (["data.prompts=2025-01-01"], r"data\.prompts: .*/2025-01-01 does not exist; give shapes:train"),
        (
            ["data.prompts={source: led.jsonl, where: {x: {low: 1}}}"],
            r"data\.prompts\.where\.x: got {'low': 1}; write a",
        ),
        (["data.prompts={source: led.jsonl, limit: many}"], r"data\.prompts\.limit: got 'many'; write a whole number"),
        (
            [f"data.prompts={{source: captions.csv, {NEGATIVE}}}"],
            r"\.columns\.negative_prompt: nothing leads away from the",
        ),
        (
            ["data.prompts={source: captions.csv, columns: {prompt: caption, image: picture}}"],
            r"data\.prompts\.columns\.image: no reward takes the reference pictures of the column 'picture'",
        ),
        (
            ["rewards=[reward.py:Near]"],
            r'data\.prompts: .*prompts\.txt, line 1: has no "image", the path of its reference',
        ),
        (
            ["data.prompts=pictured.jsonl", "rewards=[reward.py:Near]"],
            r"data\.prompts: .*pictured\.jsonl, line 2: its reference picture 1\.png does not exist",
        ),
        (
            ["evaluation={every: 1, prompts: {source: captions.csv}, scorer: 'reward.py:bright'}"],
            r"evaluation\.prompts: .*captions\.csv has no column 'prompt'",
        ),
    ],
)
def test_what_a_run_could_not_do_with_its_prompts_is_refused_by_key(
    overrides: list[str], said: str, folder: Path
) -> None:
    with pytest.raises(ConfigError, match=f"^{said}" if said.startswith("data") else said):
        load(folder, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [f"data.prompts={{source: captions.csv, {NEGATIVE}}}", "algorithm.guidance_scale=2"],
        [f"data.prompts={{source: captions.csv, {NEGATIVE}}}", "evaluation.guidance_scale=2"],
        ["data.prompts={source: captions.csv, columns: {prompt: caption, image: picture}}", "rewards=[reward.py:Near]"],
    ],
)
def test_what_something_reads_is_taken(overrides: list[str], folder: Path) -> None:
    load(folder, *overrides)


def test_a_negative_prompt_that_nothing_reads_is_noted_where_it_just_stands_there(folder: Path) -> None:
    def notes(*overrides: str) -> list[str]:
        return [note for note in load_align(folder / "run.yaml", overrides).notes if note.startswith("data.prompts")]

    (note,) = notes("data.prompts=led.jsonl")
    assert f"of {folder / 'led.jsonl'}, line 2 (1 rows have one), since no guidance_scale is above 1" in note
    assert not notes("data.prompts=led.jsonl", "algorithm.guidance_scale=2")
    assert not notes("data.prompts={source: led.jsonl, columns: {negative_prompt: null}}")


def test_a_command_line_names_a_source_or_a_section(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert given_prompts("captions.csv") == "captions.csv"
    asked = given_prompts("{source: captions.csv, columns: {prompt: caption}}")
    assert json.loads(asked.model_dump_json())["source"] == str(folder / "captions.csv")  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"^--prompts\.columms: unknown key; did you mean --prompts\.columns\?"):
        given_prompts("{source: captions.csv, columms: {}}")
