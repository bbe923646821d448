"""Further scores of one reward that are trained on: each with a weight and a scale of its own, where it applies."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from flowalign.algorithms.parts.credit import advantages
from flowalign.config.sections import RewardConfig
from flowalign.measure.evaluate import evaluation_metrics
from flowalign.samples.joined import cat_scores
from flowalign.samples.scoring import (
    TooManyInvalid,
    load_scorers,
    merge,
    require_valid,
    reward_metrics,
    score_images,
    unscored,
)
from flowalign.shapes.render import Thing, render
from flowalign.types import Scores
from rewards.interface import Asked, InvalidScores

NAN, INF = math.nan, math.inf
# Answers what its rows say: `all`, and of them `where` and `other`.
REWARDS = """
def all(images, prompts, metadata):
    return {key: [row[key] for row in metadata] for key in ("all", "where", "other")}
class Sometimes:
    sometimes = ("where",)
    def score(self, images, prompts, metadata):
        return {"Sometimes": [row["all"] for row in metadata], "where": [row["where"] for row in metadata]}
class Grouped:
    needs = {"group"}
    def answer(self, asked):
        return {"Grouped": [row["all"] for row in asked.metadata], "where": [row["where"] for row in asked.metadata]}
"""


def scored(folder: Path, rows: list[dict], *rewards: dict, groups: list[int] | None = None) -> Scores:
    (folder / "r.py").write_text(REWARDS)
    configs = [RewardConfig.model_validate({"spec": "r.py:all", **reward}) for reward in rewards]
    scorers = load_scorers(configs, folder)
    images = np.zeros((len(rows), 8, 8, 3), np.uint8)
    asked = Asked(images, [""] * len(rows), rows, groups=tuple(groups or range(len(rows))))
    weights = {name: weight for scorer in scorers for name, weight in scorer.weights.items()}
    return merge([score_images(scorer, asked) for scorer in scorers], weights)


def answers(all: list[float], where: list[float], other: list[float] | None = None, tag: str = "a") -> list[dict]:
    other = other or [0.0] * len(all)
    return [{"all": a, "where": w, "other": o, "tag": tag} for a, w, o in zip(all, where, other, strict=True)]


def test_a_part_is_added_by_its_weight_where_it_is_a_number_and_left_out_where_it_does_not_apply(tmp_path):
    rows = answers([1, 2, 3], [10, NAN, 0], [NAN, 1, 1])
    scores = scored(tmp_path, rows, {"weight": 0.5, "parts": {"where": 0.1}})
    assert scores.total.tolist() == pytest.approx([0.5 + 1, 1, 1.5 + 0]) and scores.valid.all()
    assert scores.weights == {"all": 0.5, "where": 0.1}
    assert scores.applies["where"].tolist() == [True, False, True] and "all" not in scores.applies
    # The unweighted one is a failure as ever: counted, and no sample's.
    assert scores.causes == {"other/nan": 1} and reward_metrics(scores)["reward/where/mean"] == 5


def test_parts_alone_are_trained_on_where_the_main_score_has_no_weight(tmp_path):
    scores = scored(tmp_path, answers([9, 9], [1, NAN], [NAN, 2]), {"weight": 0, "parts": {"where": 1, "other": 3}})
    assert scores.total.tolist() == [1, 6] and scores.weights == {"where": 1, "other": 3}


def test_a_sample_that_no_part_applies_to_is_invalid_and_not_0(tmp_path):
    scores = scored(tmp_path, answers([9, 9], [1, NAN]), {"weight": 0, "parts": {"where": 1}})
    assert scores.valid.tolist() == [True, False] and math.isnan(scores.total[1]) and not scores.causes


def test_a_part_that_is_no_number_for_another_reason_is_a_failure(tmp_path):
    rows = answers([1, 1, NAN, 1], [1, INF, NAN, 1e9])
    scores = scored(tmp_path, rows, {"parts": {"where": 1}})
    assert scores.valid.tolist() == [True, False, False, False]
    assert scores.causes == {"all/nan": 1, "where/inf": 1, "where/nan": 1, "where/magnitude": 1}


def test_a_reward_for_some_tasks_has_its_parts_for_these_alone(tmp_path):
    rows = [*answers([1], [5]), *answers([2], [6], tag="b")]
    scores = scored(tmp_path, rows, {"name": "every"}, {"name": "some", "tasks": ["b"], "parts": {"where": 1}})
    assert scores.total.tolist() == [1, 2 + 2 + 6]
    assert scores.applies["some.where"].tolist() == [False, True] and scores.weights["some.where"] == 1


def test_chunks_with_and_without_a_task_join(tmp_path):
    rewards = ({"name": "every"}, {"name": "some", "tasks": ["b"], "parts": {"where": 1}})
    chunks = [answers([1, 1], [5, NAN]), answers([2, 2], [6, NAN], tag="b")]
    joined = cat_scores([scored(tmp_path, rows, *rewards) for rows in chunks])
    assert joined.total.tolist() == [1, 1, 2 + 2 + 6, 2 + 2] and joined.valid.all()
    assert joined.applies["some.where"].tolist() == [False, False, True, False]


def test_a_reward_that_is_asked_group_by_group_has_parts_too(tmp_path):
    rows = answers([1, 2, 3, 4], [NAN, 1, NAN, 1])
    scores = scored(tmp_path, rows, {"spec": "r.py:Grouped", "parts": {"where": 2}}, groups=[0, 1, 0, 1])
    assert scores.total.tolist() == [1, 4, 3, 6] and scores.applies["where"].tolist() == [False, True, False, True]


def test_a_scorer_may_declare_which_of_its_scores_do_not_apply_to_every_sample(tmp_path):
    scores = scored(tmp_path, answers([1, NAN, 3], [NAN, NAN, INF]), {"spec": "r.py:Sometimes"})
    assert scores.total.tolist()[::2] == [1, 3] and scores.applies["where"].tolist() == [False, True, True]
    assert scores.causes == {"Sometimes/nan": 1, "where/nan": 1, "where/inf": 1}


def test_a_part_that_is_not_answered_is_named_with_what_is(tmp_path):
    with pytest.raises(InvalidScores, match="weighted reward 'sky'; the scorers returned all, other, where"):
        scored(tmp_path, answers([1], [1]), {"parts": {"sky": 1}})
    with pytest.raises(InvalidScores, match=r"'wheer'; .*; did you mean 'where'"):
        scored(tmp_path, answers([1], [1]), {"parts": {"wheer": 1}})


STAR, LEFT, RIGHT = Thing("star", "red", (0, 0)), Thing("ring", "red", (1, 0)), Thing("ring", "red", (0, 1))
RELATED = {
    "tag": "position",
    "include": [{"class": "star", "count": 1}, {"class": "ring", "count": 1, "position": ["right of", 0]}],
}
COUNTED = {"tag": "counting", "include": [{"class": "star", "count": 2}]}
PARTS = {"geneval_objects": 1, "geneval_counts": 1, "geneval_positions": 1}


def judged(pictures: list[list[Thing]], rows: list[dict], **reward: object) -> Scores:
    config = RewardConfig.model_validate({"spec": "geneval", "options": {"clauses": True}, **reward})
    (scorer,) = load_scorers([config], Path())
    images = np.stack([render(things, np.random.default_rng(0)) for things in pictures])
    asked = Asked(images, [""] * len(rows), rows)
    return merge([score_images(scorer, asked)], scorer.weights)


def test_a_rare_relation_counts_as_much_as_objects_that_often_fail_and_other_prompts_have_none():
    """A group of a relation, of which one image is right and two lack the star; and a group of a count."""
    related = [[STAR, RIGHT], [STAR, LEFT], [RIGHT], [RIGHT]]
    pictures = [*related, [STAR], [STAR], [STAR, RIGHT], [STAR, Thing("star", "blue", (1, 1))]]
    rows, ids = [RELATED] * 4 + [COUNTED] * 4, [0] * 4 + [1] * 4
    scores = judged(pictures, rows, weight=0, parts=PARTS)
    assert scores.valid.all() and not scores.causes
    # Within the first group objects are 1, 1, 1/2, 1/2 and positions 1, 0, 0, 0; counts of the second 1/2, 1/2, 1/2, 1.
    objects, rare = np.array([1, 1, -1, -1]), np.array([3, -1, -1, -1]) / math.sqrt(3)
    expected = np.concatenate([objects + rare, rare[::-1]])
    own = advantages(scores, ids, normalize="per_reward").values
    torch.testing.assert_close(own, torch.tensor(expected / expected.std()).float(), atol=2e-3, rtol=0)
    assert own[0] - own[1] == pytest.approx(
        float(own[7] - own[4]), abs=2e-3
    )  # the relation alone is as good as a count


def test_clauses_of_an_evaluation_are_means_over_the_tasks_that_have_them():
    scores = judged([[STAR, RIGHT], [STAR, LEFT], [STAR]], [RELATED, RELATED, COUNTED], parts=PARTS)
    metrics = evaluation_metrics(scores, [RELATED, RELATED, COUNTED])
    assert metrics["eval/geneval_positions/overall"] == metrics["eval/geneval_positions/position"] == 0.5
    assert metrics["eval/geneval_counts/overall"] == 0.5 and "eval/geneval_counts/position" not in metrics


def test_too_few_images_with_a_total_are_said_with_what_applies_to_none_of_them(tmp_path):
    rows = answers([9, 9, NAN, 9], [NAN, NAN, NAN, 1])
    scores = scored(tmp_path, rows, {"weight": 0, "parts": {"where": 1}})
    said = "(all/nan: 1, where/nan: 1, nothing that is trained on applies to 2 of 4 images (where)); nothing"
    with pytest.raises(TooManyInvalid, match=re.escape(said)):
        require_valid(scores, 0.5)
    require_valid(scores, 0.25)
    assert unscored(scored(tmp_path, rows, {"parts": {"where": 1}})) == ""
    assert unscored(Scores({}, torch.zeros(0), torch.zeros(0, dtype=torch.bool))) == ""
