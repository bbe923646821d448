from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.geneval.judge import Rules, judge, relative_position
from rewards.interface import InputError

GOLDEN = Path(__file__).parents[3] / "shared/data/golden/geneval_public.jsonl"
COPY = Path(__file__).parents[1] / "golden/geneval_public.jsonl"


def thing(box=(0, 0, 10, 10), score=0.95, color="red"):
    return {"box": list(box), "score": score, "color": color}


def counting(n, name="circle"):
    return {"tag": "counting", "include": [{"class": name, "count": n}], "exclude": [{"class": name, "count": n + 1}]}


def clause(name="circle", count=1, **more):
    return {"tag": "colors", "include": [{"class": name, "count": count, **more}]}


def position(relation="left of"):
    include = [{"class": "circle", "count": 1}, {"class": "star", "count": 1, "position": [relation, 0]}]
    return {"tag": "position", "include": include}


@pytest.mark.skipif(not (GOLDEN.is_file() or COPY.is_file()), reason="golden cases not at hand")
def test_every_public_golden_case_agrees_through_the_command_line():
    text = (COPY if COPY.is_file() else GOLDEN).read_text()
    cases = [json.loads(line) for line in text.splitlines()]
    command = [sys.executable, "-m", "rewards.scorers.geneval", "--judge-only"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    verdicts = [json.loads(line) for line in done.stdout.splitlines()]
    assert not done.stderr
    assert [v["correct"] for v in verdicts] == [case["correct"] for case in cases]
    for verdict, case in zip(verdicts, cases, strict=True):
        assert verdict["score"] == pytest.approx(case.get("score", verdict["score"]), abs=1e-9)


def test_a_line_that_is_not_a_case_is_named_and_exits_2():
    command = [sys.executable, "-m", "rewards.scorers.geneval", "--judge-only"]
    done = subprocess.run(command, input='\n{"metadata": {}}\n', capture_output=True, text=True)
    assert done.returncode == 2
    assert "line 2" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("found", "correct", "strict", "score"),
    [
        (0, False, False, 0.0),
        (1, False, False, 1 / 3),
        (3, True, True, 1.0),
        (4, False, False, 2 / 3),
        (9, False, False, 0),
    ],
)
def test_a_count_is_credited_by_its_distance_and_exclude_forbids_one_too_many(found, correct, strict, score):
    verdict = judge(counting(3), {"circle": [thing()] * found})
    assert (verdict.correct, verdict.strict) == (correct, strict)
    assert verdict.score == pytest.approx(score)


def test_an_extra_object_is_officially_correct_but_not_strictly():
    verdict = judge(clause(), {"circle": [thing(), thing()]})
    assert verdict.correct and not verdict.strict
    assert verdict.score == 0


def test_the_colour_is_tested_on_the_most_confident_object():
    blue_first = {"circle": [thing(score=0.5, color="red"), thing(score=0.9, color="blue")]}
    assert not judge(clause(color="red"), blue_first).correct
    assert judge(clause(color="blue"), blue_first).correct


def test_a_wrong_colour_costs_the_colour_clause_only():
    verdict = judge(clause(color="blue"), {"circle": [thing()]})
    assert verdict.score == 0.5
    assert verdict.reason == "expected blue circle>=1, found 0 blue; and 1 red"


def test_a_wrong_position_counts_once():
    verdict = judge(position("left of"), {"circle": [thing()], "star": [thing((50, 0, 60, 10))]})
    assert not verdict.correct
    assert verdict.score == pytest.approx(2 / 3)
    assert verdict.reason == "expected star left of target, found right of target"


def test_a_position_without_a_target_scores_0():
    verdict = judge(position("right of"), {"star": [thing((50, 0, 60, 10))]})
    assert not verdict.correct
    assert verdict.score == pytest.approx(1 / 3)
    assert "no target for star" in verdict.reason


def test_every_object_must_stand_right_to_every_target():
    metadata = position("right of")
    metadata["include"][1]["count"] = 2
    stars = [thing((50, 0, 60, 10)), thing((52, 0, 62, 10))]
    assert judge(metadata, {"circle": [thing()], "star": stars}).correct
    stars[1] = thing((0, 90, 10, 99))
    assert not judge(metadata, {"circle": [thing()], "star": stars}).correct


@pytest.mark.parametrize(
    ("box", "relations"),
    [
        ((-100, 0, -90, 10), {"left of"}),
        ((100, 0, 110, 10), {"right of"}),
        ((0, -100, 10, -90), {"above"}),
        ((0, 100, 10, 110), {"below"}),
        ((100, 100, 110, 110), {"right of", "below"}),
        # 3 px off over boxes of 10 and 10: 3 − 0.1·20 = 1 px, 1/3 of the offset: no relation.
        ((3, 0, 13, 10), set()),
        # 4 px off leaves exactly half of the offset, which is not beyond it; 5 px leave 3/5.
        ((4, 0, 14, 10), set()),
        ((5, 0, 15, 10), {"right of"}),
        ((2, 0, 12, 10), set()),
        ((0, 0, 10, 10), set()),
    ],
)
def test_relative_position_discounts_a_tenth_of_the_extents(box, relations):
    assert relative_position(box, (0, 0, 10, 10)) == relations


def test_detections_at_the_threshold_do_not_count_and_counting_wants_more():
    assert not judge(clause(), {"circle": [thing(score=0.3)]}).correct
    assert judge(clause(), {"circle": [thing(score=0.31)]}).correct
    assert not judge(counting(1), {"circle": [thing(score=0.9)]}).correct
    assert judge(counting(1), {"circle": [thing(score=0.91)]}).correct
    assert judge(counting(1), {"circle": [thing(score=0.5)]}, Rules(counting_threshold=0.3)).correct


def test_only_the_16_best_of_a_class_count():
    assert judge(counting(16), {"circle": [thing()] * 40}).correct


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "include"),
        ({"include": [{"count": 1}]}, "class"),
        ({"include": [{"class": "a", "count": 0}]}, "at least 1"),
        ({"include": [{"class": "a", "count": "2"}]}, "'2'"),
        ({"include": [{"class": "a", "count": 1, "position": ["left of", 0]}]}, "earlier include"),
        ({"include": [{"class": "a", "count": 1}], "exclude": {}}, "exclude"),
    ],
)
def test_metadata_that_is_not_genevals_is_refused(metadata, said):
    with pytest.raises(InputError, match=said):
        judge(metadata, {})


@pytest.mark.parametrize("items", [[{"box": [0, 0, 1, 1]}], [{"score": 0.9}], [{"score": 0.9, "box": [1]}], 3, [None]])
def test_detections_in_another_format_are_refused(items):
    with pytest.raises(InputError, match="detections"):
        judge(clause(), {"circle": items})


names = st.sampled_from(["circle", "star", "ring"])
colors = st.sampled_from(["red", "green", "blue"])
boxes = st.tuples(*[st.integers(0, 64)] * 4)
things = st.builds(thing, boxes, st.sampled_from([0.2, 0.4, 0.92, 0.95, 0.95]), colors)
detections = st.dictionaries(names, st.lists(things, max_size=20), max_size=3)


@st.composite
def prompts(draw):
    include = []
    for i in range(draw(st.integers(1, 3))):
        item = {"class": draw(names), "count": draw(st.integers(1, 4))}
        if draw(st.booleans()):
            item["color"] = draw(colors)
        if i and draw(st.booleans()):
            relation = draw(st.sampled_from(["left of", "right of", "above", "below"]))
            item["position"] = [relation, draw(st.integers(0, i - 1))]
        include.append(item)
    exclude = [{"class": draw(names), "count": draw(st.integers(1, 5))}] if draw(st.booleans()) else []
    return {"tag": draw(st.sampled_from(["counting", "position"])), "include": include, "exclude": exclude}


@given(prompts(), detections)
def test_the_score_stays_in_0_to_1_and_strict_implies_correct_and_full_credit(metadata, found):
    verdict = judge(metadata, found)
    assert 0 <= verdict.score <= 1
    assert verdict.correct or not verdict.strict
    assert verdict.score == 1 or not verdict.strict
    assert verdict.correct or verdict.reason


@given(prompts(), detections, st.randoms(use_true_random=False))
def test_the_verdict_is_independent_of_detection_order_at_equal_scores(metadata, found, random):
    shuffled = {name: random.sample(items, len(items)) for name, items in reversed(found.items())}
    assert judge(metadata, shuffled) == judge(metadata, found)


@given(st.integers(1, 6), st.lists(things, min_size=12, max_size=12))
def test_more_objects_never_score_less_up_to_the_wanted_count_and_never_more_beyond(n, items):
    items = [{**item, "score": 0.95} for item in items]
    scores = [judge(counting(n), {"circle": items[:k]}).score for k in range(13)]
    assert (np.diff(scores[: n + 1]) >= 0).all()
    assert (np.diff(scores[n:]) <= 0).all()
    assert scores[n] == 1


@given(prompts(), detections, st.data())
def test_one_more_object_of_a_wanted_colour_up_to_the_count_never_scores_less(metadata, found, data):
    metadata = {
        **metadata,
        "include": [{k: v for k, v in c.items() if k != "position"} for c in metadata["include"]][:1],
    }
    wanted = metadata["include"][0]
    items = [{**item, "score": 0.95} for item in found.get(wanted["class"], [])][: wanted["count"] - 1]
    more = [*items, thing(data.draw(boxes), 0.95, wanted.get("color", "red"))]
    before, after = (judge(metadata, {wanted["class"]: x}).score for x in (items, more))
    assert after > before
