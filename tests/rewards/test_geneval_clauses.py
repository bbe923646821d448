"""The clauses of a prompt as scores of their own: hand-made verdicts, and real pictures through the scorer."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flowalign.shapes.render import Thing, render
from rewards.geneval.judge import judge
from rewards.interface import Asked
from rewards.resolve import answered, resolve

NAMES = ("geneval_objects", "geneval_counts", "geneval_colors", "geneval_positions")
ONE_STAR, ONE_RING = {"class": "star", "count": 1}, {"class": "ring", "count": 1}
ROWS = [
    {"tag": "position", "include": [ONE_STAR, {**ONE_RING, "position": ["left of", 0]}]},
    {"tag": "counting", "include": [{"class": "star", "count": 2}], "exclude": [{"class": "star", "count": 3}]},
    {"tag": "color_attr", "include": [{**ONE_STAR, "color": "red"}, {**ONE_RING, "color": "blue"}]},
]
STAR, RING = Thing("star", "red", (0, 1)), Thing("ring", "red", (0, 0))


def thing(x: float = 0, color: str = "red"):
    return {"box": [x, 0, x + 10, 10], "score": 0.95, "color": color}


@pytest.mark.parametrize(
    ("row", "found", "credits"),
    [
        # Two rings where one was asked for, both left of the star: one of two objects is exact, the relation holds.
        (0, {"star": [thing(40)], "ring": [thing(), thing(1)]}, {"objects": 0.5, "positions": 1.0}),
        (0, {"star": [thing()], "ring": [thing(40)]}, {"objects": 1.0, "positions": 0.0}),
        (0, {"ring": [thing()]}, {"objects": 0.5, "positions": 0.0}),
        (1, {"star": [thing()] * 3}, {"counts": 0.5}),
        (2, {"star": [thing()], "ring": [thing(40)]}, {"objects": 1.0, "colors": 0.5}),
        (2, {}, {"objects": 0.0, "colors": 0.0}),
    ],
)
def test_credit_is_the_mean_over_the_clauses_of_a_kind(row, found, credits):
    assert judge(ROWS[row], found).credits == credits


def test_the_kinds_of_a_mixed_prompt_are_the_parts_of_its_partial_score():
    include = [
        {"class": "star", "count": 3, "color": "red"},
        {"class": "ring", "count": 1, "color": "blue", "position": ["right of", 0]},
        {"class": "circle", "count": 1},
    ]
    found = {"star": [thing(), thing(2), thing(4, "blue")], "ring": [thing(60, "blue")]}
    verdict = judge({"tag": "position", "include": include}, found)
    # Three stars of three, two of them red; a blue ring, right of stars that are not all red; no circle.
    assert verdict.credits == {"objects": 0.5, "counts": 1.0, "colors": pytest.approx((2 / 3 + 1) / 2), "positions": 0}
    number = {"objects": 2, "counts": 1, "colors": 2, "positions": 1}
    assert verdict.score == pytest.approx(sum(number[kind] * value for kind, value in verdict.credits.items()) / 6)


def test_the_scorer_answers_clauses_where_it_is_asked_to_and_nan_where_a_prompt_has_none():
    images = np.stack([render([STAR, RING], np.random.default_rng(0))] * 3)
    plain = resolve("geneval").score(images, [""] * 3, ROWS)
    found = resolve({"type": "geneval", "clauses": True}).score(images, [""] * 3, ROWS)
    assert list(plain) == ["geneval", "geneval_strict"] and list(found) == [*plain, *NAMES]
    assert all(np.array_equal(plain[name], found[name]) for name in plain)
    # A red star, and left of it a red ring: the relation holds, one star of two, a ring that should be blue.
    expected = {
        "geneval_objects": [1, math.nan, 1],
        "geneval_counts": [math.nan, 0.5, math.nan],
        "geneval_colors": [math.nan, math.nan, 0.5],
        "geneval_positions": [1, math.nan, math.nan],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_what_a_scorer_answers_with_its_options_is_known_without_asking_it():
    assert answered("geneval") == ("geneval", "geneval_strict")
    assert answered({"type": "geneval", "clauses": True}) == ("geneval", "geneval_strict", *NAMES)
    assert answered("jpeg") == ("jpeg",)
    assert answered("r.py:mine") is None and answered("url:http://127.0.0.1:1") is None


def test_clauses_come_from_a_server_as_they_are(start_server):
    server = start_server("geneval", "clauses=true")
    images = np.stack([render([STAR, RING], np.random.default_rng(0))] * 3)
    local, remote = resolve({"type": "geneval", "clauses": True}), resolve(f"url:{server.url}")
    asked = Asked(images, [""] * 3, ROWS)
    here, there = local.score(*asked_of(asked)), remote.score(*asked_of(asked))
    assert here.keys() == there.keys()
    for name in here:
        np.testing.assert_array_equal(here[name], there[name])


def asked_of(asked: Asked):
    return asked.images, list(asked.prompts), list(asked.metadata)
