"""A curriculum that nothing could tell of is refused before anything starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flowalign.config.section import ConfigError
from flowalign.intake.file import load_align
from flowalign.intake.notes import notes_of
from tests.tiny import write_config

STRICT = "data.curriculum={score: geneval_strict}"
CODE = "def mine(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"


def loaded(folder: Path, *overrides: str):
    (folder / "r.py").write_text(CODE)
    return load_align(write_config(folder), overrides).config


def test_there_is_none_unless_it_is_asked_for(tmp_path: Path) -> None:
    assert loaded(tmp_path).data.curriculum is None
    asked = loaded(tmp_path, STRICT).data.curriculum
    assert asked is not None and (asked.score, asked.threshold, asked.floor) == ("geneval_strict", 1.0, 0.1)
    assert loaded(tmp_path, STRICT, "data.curriculum=null").data.curriculum is None


@pytest.mark.parametrize(
    "fine",
    [
        ["data.curriculum={score: total, threshold: 0.9}"],
        ["data.curriculum={score: geneval}"],
        ["data.curriculum={score: geneval, threshold: 1.0e-3}"],
        ["data.curriculum={score: jpeg, threshold: -2}", "rewards=[jpeg]"],
        ["data.curriculum={score: mine, threshold: 90}", "rewards=[{spec: 'r.py:mine'}]"],
        ["data.curriculum={score: later}", "rewards=[{spec: 'r.py:mine'}]"],  # its first answer says whether
        ["data.curriculum={score: a.geneval_strict}", "rewards=[{spec: geneval, name: a}, {spec: geneval, name: b}]"],
        ["data.curriculum={score: geneval_positions}", "rewards=[{spec: geneval, options: {clauses: true}}]"],
        [
            "data.curriculum={score: geneval_strict}",
            "rewards=[{spec: geneval, tasks: [counting]}, {spec: jpeg, weight: 0.1}]",
            "data.task_weights={single_object: 0, two_object: 0, colors: 0, position: 0, color_attr: 0}",
        ],
        [STRICT, "rewards=[{spec: jpeg}, {spec: geneval, weight: 0}]"],
        [  # whose sum is 0.9999999999999999, and 1 in the float32 of scores
            "data.curriculum={score: total}",
            "rewards=[{spec: geneval, weight: 0.6}, {spec: geneval, name: b, weight: 0.3}, "
            "{spec: geneval, name: c, weight: 0.1}]",
        ],
    ],
)
def test_a_score_that_is_answered_of_every_prompt_that_is_drawn_is_fine(tmp_path: Path, fine: list[str]) -> None:
    assert loaded(tmp_path, *fine).data.curriculum is not None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.curriculum={score: geneval_strikt}"], r"data\.curriculum\.score: no .*did you mean geneval_strict\?"),
        (
            ["data.curriculum={score: geneval_positions}", "rewards=[jpeg, geneval]"],
            r"curriculum\.score: no .*'geneval_positions'; rewards\.1, geneval, does with options: {clauses: true}$",
        ),
        (
            [
                "data.curriculum={score: b.geneval_counts}",
                "rewards=[{spec: geneval, name: a}, {spec: geneval, name: b}]",
            ],
            r"curriculum\.score: no .*'b\.geneval_counts'; rewards\.1, b, does with options: {clauses: true}$",
        ),
        (["data.curriculum={score: clip}"], r"data\.curriculum\.score: .*known: total, geneval, geneval_strict"),
        (["data.curriculum={threshold: 1}"], r"data\.curriculum\.score: is missing"),
        (["data.curriculum={score: geneval, floor: 0}"], r"data\.curriculum\.floor: .*above 0"),
        (["data.curriculum={score: geneval, floor: 1.5}"], r"data\.curriculum\.floor: .*1"),
        (["data.curriculum={score: geneval, treshold: 1}"], r"data\.curriculum\.treshold: .*threshold"),
        (
            [STRICT, "rewards=[{spec: jpeg}, {spec: geneval, gold: true}]"],
            r"data\.curriculum\.score: geneval_strict is gold.*weight: 0",
        ),
        (
            [STRICT, "rewards=[{spec: jpeg}, {spec: geneval, tasks: [counting, colors]}]"],
            r"data\.curriculum\.score: geneval_strict is not for the task 'single_object'",
        ),
        (
            ["data.curriculum={score: geneval_strict, threshold: 1.5}"],
            r"data\.curriculum\.threshold: is 1\.5, which no image reaches: geneval_strict lies between 0 and 1; write "
            r"a number above 0 to 1",
        ),
        (["data.curriculum={score: geneval, threshold: 0}"], r"data\.curriculum\.threshold: is 0, which every image"),
        (["data.curriculum={score: total, threshold: 1.0000001}"], r"threshold: is 1\.0000001, which no image reaches"),
        (
            ["data.curriculum={score: total, threshold: -3}"],
            r"curriculum\.threshold: .*total lies between 0 and 1",
        ),
        (
            [
                "data.curriculum={score: total, threshold: 3.5}",
                "rewards=[{spec: geneval, weight: 3, tasks: [position]}, "
                "{spec: geneval, name: b, weight: -1, options: {clauses: true}, parts: {geneval_counts: 0.4}}]",
            ],
            r"data\.curriculum\.threshold: .*between -1 and 3\.4;",
        ),
        (["data.curriculum={score: jpeg}", "rewards=[jpeg]"], r"threshold: is 1, which no .*between -1e\+06 and 0;"),
        (
            ["data.curriculum={score: sky, threshold: 1.0e+7}", "rewards=[{spec: 'r.py:mine', parts: {sky: 1}}]"],
            r"data\.curriculum\.threshold: is 1e\+07, which no image reaches: sky lies between -1e\+06 and 1e\+06",
        ),
        (["data.curriculum={score: geneval, threshold: .inf}"], r"data\.curriculum\.threshold"),
        (
            ["data.curriculum={score: sky}", "rewards=[jpeg, {spec: 'r.py:mine', parts: {sky: 1}, tasks: [position]}]"],
            r"data\.curriculum\.score: sky is not for the task 'single_object'",
        ),
        (
            [
                "data.curriculum={score: geneval_positions}",
                "rewards=[{spec: geneval, options: {clauses: true}}]",
                "data.task_weights={position: 0}",
            ],
            r"data\.curriculum\.score: no prompt that may be drawn can have a geneval_positions; take another",
        ),
        (
            [STRICT, "algorithm={type: opd, teachers: {a: {path: model}}}", "rewards=[]"],
            r"data\.curriculum: opd learns without scores",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_its_key_and_a_reason(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        loaded(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algorithm={type: opd, teachers: {a: {path: model}}}", "rewards=[]"], "opd learns without scores of images"),
        (["data.refill=17"], "less than or equal to 16|16"),
    ],
)
def test_a_refill_where_no_group_can_be_silent_is_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.refill: .*({said})"):
        loaded(tmp_path, "data.refill=1", *overrides)


CLAUSES = "rewards=[{spec: geneval, options: {clauses: true}}]"


@pytest.mark.parametrize(
    ("overrides", "bare"),
    [
        ([CLAUSES], "single_object, two_object, counting, colors, color_attr"),
        ([CLAUSES, "data.task_weights={colors: 0, counting: 0, two_object: 0}"], "single_object, color_attr"),
        (["rewards=[jpeg, {spec: geneval, name: g, options: {clauses: true}}]"], "single_object, two_object, .*"),
        ([CLAUSES, "data.task_weights={single_object: 0, two_object: 0, counting: 0, colors: 0, color_attr: 0}"], None),
        ([CLAUSES, "data.curriculum={score: geneval_objects}"], "counting"),
        ([CLAUSES, "data.curriculum={score: geneval_strict}"], None),
        ([CLAUSES, "data.curriculum={score: total}"], None),
    ],
)
def test_tasks_that_its_score_is_not_of_are_noted(tmp_path: Path, overrides: list[str], bare: str | None) -> None:
    notes = notes_of(loaded(tmp_path, "data.curriculum={score: geneval_positions}", *overrides))
    said = [note for note in notes if note.startswith("data.curriculum")]
    assert len(said) == (bare is not None)
    for note in said:
        assert re.fullmatch(f"data.curriculum.score: geneval_[a-z]+ applies to no prompt of {bare}; .*", note)
