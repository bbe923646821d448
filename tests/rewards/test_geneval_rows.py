"""GenEval's rows: one spelling for what is judged, and everything that could never be judged is found before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewards.geneval.judge import judge
from rewards.geneval.rows import check_row
from rewards.interface import InputError, ScorerError
from rewards.resolve import row_check
from rewards.scorers.geneval import GenevalScorer

RED = {"box": [0, 0, 10, 10], "score": 0.95, "color": "red"}


def row(*include: Any, **more: Any) -> dict[str, Any]:
    return {"tag": "colors", "include": list(include), "prompt": "a photo", **more}


def check(metadata: dict[str, Any], detector: Any = "palette") -> None:
    judges = row_check({"type": "geneval", "detector": detector})
    assert judges is not None
    judges(metadata)


STAR = {"class": "star", "count": 1}


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (row({"class": "elephant", "count": 1}), "include[0].class is 'elephant', which the detector palette does not"),
        (row({"class": "elephant", "count": 1}), "known: circle, square, triangle, star, cross, ring"),
        (row({"class": "Stars", "count": 1}), "did you mean star?"),
        (row(STAR, exclude=[{"class": "cirlce", "count": 2}]), "exclude[0].class is 'cirlce', which the detector pal"),
        (row({"class": "star", "count": 0}), "include[0].count is 0; write an integer of at least 1"),
        (row({"class": "star", "count": -1}), "count is -1"),
        (row({"class": "star", "count": 1.5}), "count is 1.5"),
        (row({"class": "star", "count": "2"}), "count is '2'"),
        (row({"class": "star", "count": True}), "count is True"),
        (row({"class": "star"}), "count is None"),
        (row(STAR, exclude=[{"class": "star", "count": 0}]), "exclude[0].count is 0"),
        (row({"class": "star", "count": 1, "color": "pink"}), "include[0].color is 'pink'"),
        (row({"class": "star", "count": 1, "color": "oragne"}), "did you mean orange?"),
        (row({"class": "star", "count": 1, "color": ["red"]}), "color is ['red']; write the name of one colour"),
        (row({"class": "star", "count": 1, "colour": "red"}), "include[0] has the key 'colour'; did you mean 'color'?"),
        (row(STAR, {"class": "ring", "count": 1, "position": ["leftof", 0]}), "include[1].position is 'leftof'"),
        (row(STAR, {"class": "ring", "count": 1, "position": ["behind", 0]}), "known: left of, right of, above, below"),
        (row(STAR, {"class": "ring", "count": 1, "position": ["above", 1]}), "earlier include clause"),
        (row(STAR, {"class": "ring", "count": 1, "position": ["above", True]}), "earlier include clause"),
        (row(STAR, {"class": "ring", "count": 1, "position": "above"}), "earlier include clause"),
        (row({"class": "", "count": 1}), "include[0] has no `class`"),
        (row({"class": 3, "count": 1}), "include[0] has no `class`"),
        (row("star"), "include[0] has no `class`"),
        (row(), "has no `include` list"),
        ({"tag": "a", "include": STAR}, "include is a dict; write a list of clauses"),
        ({"include": [STAR]}, "has no `tag`"),
        ({"tag": 3, "include": [STAR]}, "has no `tag`"),
        ({"tag": "a", "include": [STAR], "excludes": [STAR]}, "the row has the key 'excludes'; did you mean 'exclude'"),
        ({"prompt": "a cat", "tag": "a"}, "the row of prompt 'a cat' has no `include` list"),
    ],
)
def test_a_row_that_could_never_be_judged_is_refused(metadata: dict[str, Any], said: str):
    with pytest.raises(InputError) as caught:
        check(metadata)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "metadata",
    [
        row({"class": "Star", "count": 1, "color": "RED"}),
        row({"class": " star ", "count": 1, "color": None, "position": None}, exclude=None),
        row(STAR, {"class": "ring", "count": 1, "position": ["Left  of", 0]}),
        row(STAR, tags=["a"], includes_people=False, id=7),
    ],
)
def test_capitals_and_the_nulls_of_a_table_are_no_fault(metadata: dict[str, Any]):
    check(metadata)


def test_a_star_is_a_star_however_it_is_written():
    asked = row({"class": "Star", "count": 1, "color": "Red"}, {"class": "RING", "count": 1, "position": ["Above", 0]})
    above = {**RED, "box": [0, 0, 10, 10]}
    found = {"STAR": [{**RED, "box": [0, 40, 10, 50], "color": "RED"}], "ring": [above]}
    assert judge(asked, found).strict and judge(asked, found).score == 1
    assert not judge(asked, {**found, "STAR": [{**RED, "color": "blue"}]}).correct
    both = {"star": [RED], "Star": [{**RED, "box": [20, 20, 30, 30]}]}
    assert judge(row({"class": "star", "count": 2}), both).strict


def test_a_colour_that_is_null_is_not_asked_for():
    assert judge(row({"class": "star", "count": 1, "color": None}), {"star": [{**RED, "color": None}]}).score == 1
    assert judge(row({"class": "star", "count": 1, "color": None}), {"star": [RED]}).strict


def directory(path: Path, labels: list[str]) -> dict[str, Any]:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"id2label": dict(enumerate(labels))}))
    return {"type": "mask2former", "path": str(path)}


def test_mask2former_knows_the_names_in_its_configuration_file(tmp_path: Path):
    own = directory(tmp_path / "own", ["Dog", "traffic light"])
    check(row({"class": "dog", "count": 1}), own)
    check(row({"class": "Traffic light", "count": 1}), own)
    with pytest.raises(InputError, match="'cat', which the detector mask2former does not know; known: dog, traffic"):
        check(row({"class": "cat", "count": 1}), own)
    check(row({"class": "cat", "count": 1}), {**own, "classes": ["cat", "dog"]})


def test_mask2former_of_80_classes_has_the_benchmarks_names(tmp_path: Path):
    coco = directory(tmp_path / "coco", [f"c{i}" for i in range(80)])
    check(row({"class": "computer mouse", "count": 1}), coco)
    with pytest.raises(InputError, match=r"'mouse', .*did you mean computer mouse"):
        check(row({"class": "mouse", "count": 1}), coco)
    with pytest.raises(InputError, match=r"'xylophone', .*known: person, bicycle, .* and 68 more"):
        check(row({"class": "xylophone", "count": 1}), coco)


def test_a_colour_needs_who_can_tell_it(tmp_path: Path):
    own = directory(tmp_path / "own", ["dog"])
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(InputError, match="tells no colours; give it `clip`"):
        check(row({"class": "dog", "count": 1, "color": "red"}), own)
    clip = {"path": str(tmp_path), "names": ["red", "blue"]}
    with pytest.raises(InputError, match=r"'green'.*known: red, blue"):
        check(row({"class": "dog", "count": 1, "color": "green"}), {**own, "clip": clip})


@pytest.mark.parametrize("content", [b"\xff\xfe{\x00", b"[]", b"{", b"[" * 100_000])
def test_a_configuration_file_that_is_none_is_said(tmp_path: Path, content: bytes):
    own = directory(tmp_path / "own", ["dog"])
    (tmp_path / "own" / "config.json").write_bytes(content)
    with pytest.raises(ScorerError, match="is no configuration of a model"):
        check(row({"class": "dog", "count": 1}), own)


def test_only_scorers_that_judge_rows_have_them_checked():
    assert row_check("jpeg") is None
    assert row_check({"type": "no_such_file.py:reward"}) is None
    assert row_check("url:http://localhost:1") is None


def test_a_scorer_refuses_what_its_detector_cannot_find_wherever_the_row_comes_from():
    scorer, image = GenevalScorer(), np.zeros((1, 32, 32, 3), np.uint8)
    assert scorer.score(image, ["a"], [row(STAR)])["geneval"].tolist() == [0]
    for clause, said in (({"class": "elephant", "count": 1}, "elephant"), ({**STAR, "color": "pink"}, "pink")):
        with pytest.raises(InputError, match=f"is '{said}', which the detector palette does not know"):
            scorer.score(image, ["a"], [row(clause)])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"include": [{"class": "star", "count": 17}]}, r"include\[0\].count is 17, and at most 16"),
        (
            {"include": [{"class": "star", "count": 3}], "exclude": [{"class": "Star", "count": 3}]},
            "forbids 3 of star and more, of which include wants 3",
        ),
    ],
)
def test_a_row_that_no_image_fulfils_is_refused(row: dict[str, Any], said: str):
    with pytest.raises(InputError, match=said):
        check_row({"tag": "counting", "prompt": "stars"} | row, None, None, "the detector")


def test_a_tag_in_capitals_has_the_threshold_of_its_task():
    row = {"include": [{"class": "star", "count": 1}]}
    found = {"star": [{"box": [0, 0, 9, 9], "score": 0.5}]}
    assert [judge({"tag": tag} | row, found).correct for tag in ("counting", "Counting", "two_object")] == [
        False,
        False,
        True,
    ]
