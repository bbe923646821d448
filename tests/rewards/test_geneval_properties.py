"""Properties of the GenEval judge in each of its modes.

Modes differ in what an extra object costs: ``official`` follows the benchmark, for which "at least" is enough unless
the prompt excludes more; ``strict`` wants the exact count; ``partial`` loses credit with the distance from it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowalign.shapes.render import Thing, render
from rewards.geneval.judge import BENCHMARK, judge
from rewards.resolve import resolve

MODES = ("official", "strict", "partial")
FIELDS = {"official": "correct", "strict": "strict", "partial": "score"}
CLASSES = ("circle", "star", "ring")
RELATIONS = ("left of", "right of", "above", "below")

each_mode = pytest.mark.parametrize("mode", MODES)
colors = st.sampled_from(["red", "green", "blue"])
edges = st.integers(0, 64)
boxes = st.tuples(edges, edges, st.integers(1, 20), st.integers(1, 20)).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)


def things(scores: st.SearchStrategy[float]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"box": boxes, "score": scores, "color": colors})


anything = things(st.sampled_from([0.1, 0.3, 0.31, 0.5, 0.9, 0.91, 0.99]))
detections = st.dictionaries(st.sampled_from(CLASSES), st.lists(anything, max_size=20))
# Several of each class at two scores, so that a count often falls between equals.
crowds = st.fixed_dictionaries(
    {name: st.lists(things(st.sampled_from([0.92, 0.95])), min_size=3, max_size=20) for name in CLASSES}
)


@st.composite
def prompts(draw, excludes: bool = True) -> dict[str, Any]:
    """GenEval metadata with each class in at most one ``include`` clause, as in the benchmark's own prompts."""
    include: list[dict[str, Any]] = []
    for i, name in enumerate(draw(st.permutations(CLASSES))[: draw(st.integers(1, 3))]):
        clause: dict[str, Any] = {"class": name, "count": draw(st.integers(1, 5))}
        if draw(st.booleans()):
            clause["color"] = draw(colors)
        if i and draw(st.booleans()):
            clause["position"] = [draw(st.sampled_from(RELATIONS)), draw(st.integers(0, i - 1))]
        include.append(clause)
    metadata = {"tag": draw(st.sampled_from(["counting", "position", "color_attr"])), "include": include}
    if excludes and draw(st.booleans()):
        metadata["exclude"] = [{"class": draw(st.sampled_from(CLASSES)), "count": draw(st.integers(1, 6))}]
    return metadata


def scored(mode: str, metadata: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> float:
    return float(getattr(judge(metadata, found), FIELDS[mode]))


@each_mode
@given(metadata=prompts(), found=detections)
def test_the_score_is_in_0_to_1_and_all_or_nothing_but_for_partial_credit(mode, metadata, found):
    value = scored(mode, metadata, found)
    assert 0 <= value <= 1
    assert mode == "partial" or value in (0, 1)


@given(metadata=prompts(), found=detections)
def test_strict_implies_official_and_full_partial_credit(metadata, found):
    official, strict, partial = (scored(mode, metadata, found) for mode in MODES)
    assert strict <= official
    assert strict <= partial
    assert partial < 1 or strict == official


@each_mode
@given(metadata=prompts(), found=crowds, random=st.randoms(use_true_random=False))
def test_the_order_of_detections_plays_no_part_even_at_equal_scores(mode, metadata, found, random):
    shuffled = {name: random.sample(items, len(items)) for name, items in reversed(found.items())}
    assert scored(mode, metadata, shuffled) == scored(mode, metadata, found)


def room(metadata: dict[str, Any], found: dict[str, list[dict[str, Any]]], index: int) -> tuple[str, int, list]:
    """Class, wanted count and counted objects of an ``include`` clause, all of them scored alike."""
    clause = metadata["include"][index % len(metadata["include"])]
    return clause["class"], clause["count"], [{**item, "score": 0.95} for item in found.get(clause["class"], [])]


@each_mode
@given(metadata=prompts(), found=detections, index=st.integers(0, 2), more=things(st.just(0.92)))
def test_one_more_object_while_too_few_are_found_never_scores_less(mode, metadata, found, index, more):
    """Whatever its colour and place: a clause that lacks objects fails all of its other conditions but the colour's."""
    name, count, items = room(metadata, found, index)
    items = items[: count - 1]
    before = scored(mode, metadata, {**found, name: items})
    assert scored(mode, metadata, {**found, name: [*items, more]}) >= before


@given(metadata=prompts(), found=detections, index=st.integers(0, 2), more=things(st.just(0.92)))
def test_one_more_object_while_too_few_are_found_scores_more_in_partial_credit(metadata, found, index, more):
    name, count, items = room(metadata, found, index)
    items = items[: count - 1]
    before = scored("partial", metadata, {**found, name: items})
    assert scored("partial", metadata, {**found, name: [*items, more]}) > before


@each_mode
@given(
    metadata=prompts(),
    found=detections,
    index=st.integers(0, 2),
    items=st.lists(things(st.just(0.95)), min_size=5, max_size=BENCHMARK.max_objects - 1),
    surplus=boxes,
)
def test_one_object_less_while_too_many_are_found_never_scores_less(mode, metadata, found, index, items, surplus):
    """The least confident one, of a colour that nobody wants: the others are judged as before."""
    name, count, _ = room(metadata, found, index)
    assert len(items) >= count
    last = {"box": surplus, "score": 0.92, "color": "white"}
    before = scored(mode, metadata, {**found, name: [*items, last]})
    assert scored(mode, metadata, {**found, name: items}) >= before


def test_a_surplus_object_of_the_wanted_colour_may_be_worth_its_colour():
    """Why the property above leaves that colour out: of three circles for one red one, only the last is red."""
    metadata = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}
    seen = ("blue", "blue", "red")
    three = [{"box": [i, 0, i + 9, 9], "score": 0.9 - i / 10, "color": color} for i, color in enumerate(seen)]
    assert [scored("partial", metadata, {"circle": three[:n]}) for n in (3, 2, 1)] == [0.5, 0, 0.5]
    assert [scored("official", metadata, {"circle": three[:n]}) for n in (3, 2, 1)] == [0, 0, 0]


@each_mode
@given(count=st.integers(1, 6), items=st.lists(things(st.just(0.95)), min_size=14, max_size=14))
def test_a_count_alone_is_best_where_it_is_met(mode, count, items):
    """Towards the wanted number no mode loses; beyond it ``official`` keeps its 1 where nothing is excluded."""
    metadata = {"tag": "counting", "include": [{"class": "circle", "count": count}]}
    values = np.array([scored(mode, metadata, {"circle": items[:n]}) for n in range(15)])
    assert values[count] == 1
    assert (np.diff(values[: count + 1]) >= 0).all()
    if mode == "official":
        assert (values[count:] == 1).all()
    else:
        assert (np.diff(values[count:]) <= 0).all() and values[count + 1] < 1


@each_mode
@given(count=st.integers(1, 6), items=st.lists(things(st.just(0.95)), min_size=14, max_size=14))
def test_with_the_benchmarks_exclude_every_mode_falls_beyond_the_count(mode, count, items):
    metadata = {
        "tag": "counting",
        "include": [{"class": "circle", "count": count}],
        "exclude": [{"class": "circle", "count": count + 1}],
    }
    values = np.array([scored(mode, metadata, {"circle": items[:n]}) for n in range(15)])
    assert values[count] == 1 and values[count + 1] < 1
    assert (np.diff(values[count:]) <= 0).all()


@given(found=detections, metadata=prompts(excludes=False), name=st.sampled_from(CLASSES), count=st.integers(1, 6))
def test_an_exclusion_never_helps_and_leaves_partial_credit_alone(found, metadata, name, count):
    stricter = {**metadata, "exclude": [{"class": name, "count": count}]}
    for mode in ("official", "strict"):
        assert scored(mode, stricter, found) <= scored(mode, metadata, found)
    assert scored("partial", stricter, found) == scored("partial", metadata, found)


cells = [(row, column) for row in (0, 1) for column in (0, 1)]
shapes, hues = st.sampled_from(["circle", "star"]), st.sampled_from(["red", "blue"])
drawn = st.lists(st.builds(Thing, shapes, hues, st.sampled_from(cells)), unique_by=lambda thing: thing.cell, max_size=4)


@each_mode
@settings(deadline=None, max_examples=50)
@given(shown=drawn, wanted=shapes, color=hues, seed=st.integers(0, 99))
def test_rendered_shapes_are_scored_by_how_many_of_them_are_wanted(mode, shown, wanted, color, seed):
    image = render(shown, np.random.default_rng(seed))
    metadata = {"tag": "colors", "include": [{"class": wanted, "count": 1, "color": color}]}
    scorer = resolve({"type": "geneval", "mode": mode})
    value = float(scorer.score(image[None], ["p"], [metadata])["geneval"][0])
    of_class = [thing for thing in shown if thing.shape == wanted]
    of_color = sum(thing.color == color for thing in of_class)
    if mode == "partial":
        assert value == ((len(of_class) == 1) + (of_color == 1)) / 2
    elif mode == "strict":
        assert value == (len(of_class) == of_color == 1)
    elif of_color in (0, len(of_class)):
        assert value == (of_color > 0)
    else:  # the most confident one decides
        assert value in (0, 1)
