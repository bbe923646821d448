"""Scores of several rewards go by one name each: none takes another's place, whoever answers it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from flowalign.config.section import ConfigError
from flowalign.config.sections import RewardConfig
from flowalign.samples.joined import cat_scores
from flowalign.samples.offers import check_reward_names
from flowalign.samples.scoring import NamedScorer, load_scorers, merge, score_images
from rewards.http.client import HttpScorer
from rewards.interface import Asked, InvalidScores, SpecError

REWARDS = """
def first(images, prompts, metadata):
    return images.mean(axis=(1, 2, 3))
def second(images, prompts, metadata):
    return {"second": [0.0] * len(images), "first": [-100.0] * len(images)}
def third(images, prompts, metadata):
    return {"third": [0.0] * len(images), "side": [1.0] * len(images)}
def fourth(images, prompts, metadata):
    return {"fourth": [0.0] * len(images), "side": [2.0] * len(images)}
def summed(images, prompts, metadata):
    return {"summed": [0.0] * len(images), "total": [-5.0] * len(images)}
class Class:
    name = "Class"
    def __init__(self, value=0.0):
        self.value = value
    def score(self, images, prompts, metadata):
        return {"Class": [self.value] * len(images), "half": [self.value / 2] * len(images)}
"""
IMAGES = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)


def configured(*names: str, **changes: object) -> list[RewardConfig]:
    return [RewardConfig.model_validate({"spec": f"r.py:{name}", **changes}) for name in names]


def scored(folder: Path, rewards: list[RewardConfig], tags: tuple[str, str] = ("a", "a")):
    (folder / "r.py").write_text(REWARDS)
    scorers = load_scorers(rewards, folder)
    parts = [
        score_images(scorer, Asked(IMAGES.numpy(), ["p", "p"], [{"tag": tag} for tag in tags])) for scorer in scorers
    ]
    return merge(parts, {scorer.name: scorer.weight for scorer in scorers})


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("first", "second"), "reward 'second' also answers a score 'first', another reward's name"),
        (("second", "first"), "reward 'second' also answers a score 'first', another reward's name"),
        (("third", "fourth"), "rewards 'third' and 'fourth' both answer a score 'side', and one would be lost"),
        (("first", "summed"), "reward 'summed' answers a score 'total', as the weighted sum is called"),
    ],
)
def test_a_score_that_two_rewards_answer_is_refused_with_their_names(tmp_path, names, said):
    with pytest.raises(InvalidScores, match=re.escape(said)):
        scored(tmp_path, configured(*names))


def test_a_server_that_answers_another_reward_s_name_is_refused(tmp_path, shared_server):
    (tmp_path / "r.py").write_text(REWARDS)
    server = NamedScorer("index", 1.0, HttpScorer(shared_server("echo").url))
    own = load_scorers(configured("first", name="length"), tmp_path)[0]
    parts = [score_images(scorer, Asked(IMAGES.numpy(), ["p", "p"], [{"i": 0}, {"i": 1}])) for scorer in (own, server)]
    with pytest.raises(InvalidScores, match="reward 'index' also answers a score 'length'"):
        merge(parts, {"index": 1.0, "length": 1.0})


def test_rewards_of_different_tasks_that_answer_one_name_are_refused_where_their_chunks_meet(tmp_path):
    rewards = [*configured("third", tasks=["a"]), *configured("fourth", tasks=["b"])]
    chunks = [scored(tmp_path, rewards, tags) for tags in (("a", "a"), ("b", "b"))]
    with pytest.raises(InvalidScores, match="both answer a score 'side'"):
        cat_scores(chunks)


def test_one_scorer_under_two_names_keeps_its_further_scores_apart(tmp_path):
    rewards = [*configured("Class"), *configured("Class", name="twice", options={"value": 8.0})]
    found = scored(tmp_path, rewards).by_reward
    assert {name: values.tolist()[0] for name, values in found.items()} == {
        "Class": 0,
        "half": 0,
        "twice": 8,
        "twice.half": 4,
    }


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([{"spec": "geneval"}, {"spec": "jpeg", "name": "geneval_strict"}], "reward 'geneval' also answers"),
        ([{"spec": "jpeg", "name": "a"}, {"spec": "r.py:a"}], "two rewards go by the name 'a'"),
        ([{"spec": "jpeg"}, {"spec": "r.py:total"}], "reward 'total' answers a score 'total'"),
        ([{"spec": "geneval"}, {"spec": "geneval", "name": "geneval_strict"}], "reward 'geneval' also answers"),
    ],
)
def test_names_that_are_known_to_be_shared_are_refused_before_anything_starts(tmp_path, rewards, said):
    configs = [RewardConfig.model_validate(reward) for reward in rewards]
    with pytest.raises(ConfigError, match=said) as caught:
        check_reward_names("rewards", configs)
    assert caught.value.key == "rewards"
    with pytest.raises(SpecError, match=said):
        load_scorers(configs, tmp_path)


def test_two_genevals_of_one_run_are_fine():
    check_reward_names("evaluation", [RewardConfig(spec="geneval"), RewardConfig(spec="geneval", name="partial")])


def test_what_a_reward_changes_in_metadata_and_prompts_reaches_no_other(tmp_path):
    rows = [{"include": [{"class": "ring", "count": 2}], "of": {"deep": [[1]]}}] * 2
    (tmp_path / "r.py").write_text(
        "def spoil(images, prompts, metadata):\n"
        "    for row in metadata:\n"
        "        row['include'][0]['count'] += 7\n"
        "        row['of']['deep'][0].append(row['include'][0]['count'])\n"
        "    images[:], prompts[:] = 9, ['x'] * len(prompts)\n"
        "    return [float(row['include'][0]['count']) for row in metadata]\n"
    )
    prompts = ["p", "q"]
    for _ in range(2):
        scorer = load_scorers(configured("spoil"), tmp_path)[0]
        found = score_images(scorer, Asked(IMAGES.numpy(), prompts, rows))
        np.testing.assert_array_equal(found.scores["spoil"], [9, 9])  # and not of the row before
    assert rows[0] == {"include": [{"class": "ring", "count": 2}], "of": {"deep": [[1]]}}
    assert prompts == ["p", "q"] and not IMAGES.any()
