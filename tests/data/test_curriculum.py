"""Prompts that are drawn by how often the policy passes them."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from flowalign.config.curriculum import CurriculumConfig
from flowalign.config.section import ConfigError
from flowalign.data.curriculum import CurriculumSampler
from flowalign.data.prompts import Row
from flowalign.types import PromptBatch, Scores

ROWS: list[Row] = [{"prompt": f"{tag}{i}", "tag": tag} for tag, count in (("a", 2), ("b", 4)) for i in range(count)]
NAN = math.nan


def sampler(
    rows: list[Row] = ROWS, *, groups: int = 4, group_size: int = 4, floor: float = 0.1, seed: int = 0, **options
) -> CurriculumSampler:
    curriculum = CurriculumConfig(score="strict", floor=floor)
    return CurriculumSampler(rows, curriculum=curriculum, groups=groups, group_size=group_size, seed=seed, **options)


def scored(*groups: tuple[str, list[float]]) -> tuple[PromptBatch, Scores]:
    """A prompt, which begins with its task, and the scores of its images, a group each."""
    own = [(group, prompt, score) for group, (prompt, given) in enumerate(groups) for score in given]
    ids, prompts, values = zip(*own, strict=True)
    rows = tuple({"prompt": prompt, "tag": prompt[0]} for prompt in prompts)
    score = torch.tensor(values, dtype=torch.float32)
    batch = PromptBatch(prompts, ids, tuple(range(len(own))), rows)
    return batch, Scores({"strict": score}, torch.full_like(score, NAN), score.isfinite())


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_a_surprise_moves_a_prompt_by_three_and_its_task_by_one() -> None:
    drawn = sampler()
    # Three of four pass where a half was expected: a surprise of 1/4. Then none does where logistic(1/4) was expected.
    drawn.learn(*scored(("a0", [1, 1, 0, 1]), ("a1", [0, 0, 0, 0])))
    second = -logistic(0.25)
    task, first = 0.25 + second, 0.75
    rates = [logistic(task + first), logistic(task + 3 * second), 0.5, 0.5, 0.5, 0.5]
    np.testing.assert_allclose(drawn.pass_rates(), rates, rtol=1e-12)
    state = drawn.state()
    assert state["a"]["rating"] == pytest.approx(task) and state["a"]["prompts"]["a0"] == pytest.approx(first)
    assert state["b"] == {"rating": 0.0, "prompts": {}}


def test_the_first_group_brings_a_prompt_to_about_its_rate_and_its_task_a_quarter_of_the_way() -> None:
    drawn = sampler()
    drawn.learn(*scored(("b0", [1, 1, 0, 0, 0, 0, 0, 0])))
    assert drawn.pass_rates()[2] == pytest.approx(logistic(-1)) == pytest.approx(0.27, abs=0.01)
    assert drawn.pass_rates()[3] == pytest.approx(logistic(-0.25)) == pytest.approx(0.44, abs=0.01)


def test_masked_images_count_for_nothing() -> None:
    full, masked, none = sampler(), sampler(), sampler()
    full.learn(*scored(("a0", [1, 1, 0, 1])))
    measured = masked.learn(*scored(("a0", [1, NAN, 0, 1])))
    # Two of three pass where 1/2 was expected: half a pass more than expected, in a group of four.
    assert masked.state()["a"]["rating"] == pytest.approx(0.5 / 4)
    assert measured["curriculum/pass_rate"] == pytest.approx(2 / 3)
    measured = none.learn(*scored(("a0", [NAN] * 4)))
    assert none.state() == sampler().state() and math.isnan(measured["curriculum/pass_rate"])


def test_an_image_passes_from_the_threshold_on() -> None:
    batch, scores = scored(("a0", [0.7, 0.69, 0.9, 0.0]))
    scores = replace(scores, by_reward={}, total=scores.by_reward["strict"])
    curriculum = CurriculumConfig(score="total", threshold=0.7)
    drawn = CurriculumSampler(ROWS, curriculum=curriculum, groups=1, group_size=4, seed=0)
    assert drawn.learn(batch, scores)["curriculum/pass_rate"] == 0.5


def test_a_score_that_nobody_answers_is_refused_with_those_there_are() -> None:
    batch, scores = scored(("a0", [1, 0]))
    with pytest.raises(
        ConfigError, match=r"^data\.curriculum\.score: no reward answers 'strict'; did you mean stric\?"
    ):
        sampler().learn(batch, replace(scores, by_reward={"stric": scores.total}))


def known(drawn: CurriculumSampler, task: float = 0.0, **prompts: float) -> CurriculumSampler:
    """Ratings as a checkpoint has them."""
    own = {name: {"rating": task, "prompts": {}} for name in "ab"}
    for prompt, rating in prompts.items():
        own[prompt[0]]["prompts"][prompt] = rating
    drawn.restore(own)
    return drawn


def test_weights_are_the_variance_of_a_pass_above_a_floor_and_a_task_s_is_their_mean() -> None:
    third = math.log(1 / 2)  # a pass rate of 1/3, whose 4 p (1 - p) is 8/9
    drawn = known(sampler(floor=0.25, task_weights={"a": 3}), a1=third, b0=-40.0)
    middle, eight_ninths, never = 1.0, 0.25 + 0.75 * 8 / 9, 0.25
    expected = [3 * middle / 2, 3 * eight_ninths / 2, never / 4, middle / 4, middle / 4, middle / 4]
    np.testing.assert_allclose(drawn.weights(), expected, rtol=1e-12)


def test_the_metrics_say_each_task_s_rate_and_its_share_of_the_next_groups() -> None:
    drawn = known(sampler(floor=0.25), b0=-40.0, b1=40.0)
    measured = drawn.learn(*scored(("b2", [NAN])))
    assert "curriculum/a/pass_rate" not in measured  # no image of a was ever measured
    assert measured["curriculum/b/pass_rate"] == pytest.approx(0.5)
    share = (0.25 + 0.25 + 1 + 1) / 4
    assert measured["curriculum/b/share"] == pytest.approx(share / (1 + share))
    assert measured["curriculum/a/share"] + measured["curriculum/b/share"] == pytest.approx(1)


def test_a_task_has_a_pass_rate_from_its_first_valid_score_on_through_a_checkpoint_too() -> None:
    drawn = sampler()
    assert "curriculum/b/pass_rate" not in drawn.learn(*scored(("a0", [1, 0]), ("b0", [NAN, NAN])))
    first = drawn.learn(*scored(("b0", [1, NAN, 0]), ("a0", [NAN, NAN])))
    # Half of b's images passed as was expected, which moves no rating; it was measured all the same.
    assert first["curriculum/b/pass_rate"] == 0.5 and drawn.state()["b"] == {"rating": 0.0, "prompts": {"b0": 0.0}}
    resumed = sampler()
    resumed.restore(json.loads(json.dumps(drawn.state())))
    nothing = scored(("a0", [NAN]))
    assert resumed.learn(*nothing) == pytest.approx(drawn.learn(*nothing), nan_ok=True)
    assert "curriculum/b/pass_rate" in resumed.learn(*nothing)


def test_prompts_without_a_tag_are_one_task() -> None:
    drawn = sampler([{"prompt": "x"}, {"prompt": "y"}], groups=2, group_size=1)
    batch = drawn.batch(0)
    passed = Scores({"strict": torch.ones(2)}, torch.ones(2), torch.ones(2, dtype=torch.bool))
    assert set(drawn.learn(batch, passed)) == {
        "curriculum/pass_rate",
        "curriculum/untagged/pass_rate",
        "curriculum/untagged/share",
    }
    assert list(drawn.state()) == [""]


def test_each_prompt_has_its_share_of_every_iteration_s_groups_or_one_more_or_less() -> None:
    drawn = known(sampler(groups=8), b0=2.0, b1=-3.0, a0=1.0)
    shares = 8 * drawn.weights() / drawn.weights().sum()
    total = np.zeros(6)
    for iteration in range(400):
        batch = drawn.batch(iteration)
        counts = Counter(batch.prompts[::4])
        found = np.array([counts[row["prompt"]] for row in ROWS])
        assert found.sum() == 8 and (abs(found - shares) < 1).all()
        assert abs(found[:2].sum() - shares[:2].sum()) < 1  # of each task too
        total += found
    np.testing.assert_allclose(total / 400, shares, atol=0.08)


def test_a_draw_is_a_function_of_seed_iteration_and_ratings() -> None:
    one, other = known(sampler(), a0=1.0), known(sampler(), a0=1.0)
    for _ in range(2):  # nothing is drawn away
        assert [one.batch(i) for i in (3, 1, 2)] == [other.batch(i) for i in (3, 1, 2)]
    assert one.batch(1).prompts != one.batch(2).prompts
    assert [sampler(seed=1).batch(i).prompts for i in range(4)] != [sampler().batch(i).prompts for i in range(4)]
    assert one.batch(2).group_ids[::4] == (8, 9, 10, 11) and one.batch(2).sample_ids == tuple(range(32, 48))


def test_a_task_without_a_weight_is_not_drawn_and_its_texts_are_not_asked_for() -> None:
    drawn = sampler(task_weights={"a": 0})
    assert {prompt[0] for i in range(5) for prompt in drawn.batch(i).prompts} == {"b"}
    assert [row["prompt"] for row in drawn.rows(1)] == ["b0", "b1", "b2", "b3"]


def test_ratings_go_through_json_to_the_bit_and_an_empty_state_is_the_beginning() -> None:
    one, other = sampler(), sampler()
    one.learn(*scored(("a0", [1, 0, 0]), ("b3", [1, 1, 0]), ("a0", [0, 0, 0])))
    other.restore(json.loads(json.dumps(one.state())))
    assert np.array_equal(one.weights(), other.weights()) and one.state() == other.state()
    other.restore({})
    assert np.array_equal(other.weights(), sampler().weights())


def test_prompts_that_were_moved_keep_their_ratings_and_those_that_are_gone_lose_them() -> None:
    one, other = sampler(), sampler(ROWS[:0:-1])  # backwards, and without a0
    one.learn(*scored(("a0", [1, 1]), ("a1", [0, 0]), ("b0", [1, 1])))
    other.restore(one.state())
    (a0, a1, *b), (*b_backwards, a1_moved) = one.pass_rates(), other.pass_rates()
    assert b == b_backwards[::-1] and a1 == a1_moved and a0 != 0.5
    assert set(one.state()["a"]["prompts"]) == {"a0", "a1"} and set(other.state()["a"]["prompts"]) == {"a1"}


def test_a_task_of_its_own_word_goes_before_the_tag() -> None:
    rows = [{"prompt": "a0", "tag": "a", "task": "mine"}, {"prompt": "a1", "tag": "a"}]
    batch, scores = scored(("a0", [1, 1]))
    drawn = sampler(rows)
    drawn.learn(replace(batch, metadata=(rows[0],) * 2), scores)
    assert set(drawn.state()) == {"mine", "a"} and set(drawn.state()["mine"]["prompts"]) == {"a0"}


def test_the_same_prompt_twice_in_a_task_is_one() -> None:
    drawn = sampler([*ROWS, ROWS[0]])
    drawn.learn(*scored(("a0", [1, 1])))
    rates = drawn.pass_rates()
    assert rates[0] == rates[2] > rates[1] and list(drawn.state()["a"]["prompts"]) == ["a0"]


def test_a_policy_that_learns_is_followed_and_most_of_what_can_be_won_is_won() -> None:
    """Six tasks of unequal size and difficulty are learned in 120 iterations, each prompt at its own distance."""
    chance = np.random.default_rng(0)
    sizes = [8, 40, 24, 48, 170, 820]
    rows: list[Row] = [
        {"prompt": f"{task} {i}", "tag": str(task)} for task, size in enumerate(sizes) for i in range(size)
    ]
    task = np.repeat(np.arange(6), sizes)
    own = chance.normal(0, 1.2, len(rows))
    start, end = np.array([0, -0.4, 0.6, 0.3, -1.6, -1.5]), np.array([3, 1.5, 1.2, 4, 0.5, 0.8])
    place = {row["prompt"]: i for i, row in enumerate(rows)}
    drawn = sampler(rows, groups=24, group_size=8)
    teaches = {"uniform": [], "drawn": [], "best": []}
    for iteration in range(120):
        true = 1 / (1 + np.exp(-(start + (end - start) * iteration / 120)[task] - own))
        variance = 4 * true * (1 - true)
        batch = drawn.batch(iteration)
        chosen = np.array([place[prompt] for prompt in batch.prompts])
        passed = torch.from_numpy((chance.random(len(chosen)) < true[chosen]).astype(np.float32))
        uniform = 1 / np.array(sizes)[task]
        best = uniform * (0.1 + 0.9 * variance)
        if iteration >= 20:
            teaches["drawn"].append(variance[chosen].mean())
            teaches["uniform"].append(np.average(variance, weights=uniform))
            teaches["best"].append(np.average(variance, weights=best))
        drawn.learn(batch, Scores({"strict": passed}, passed, torch.ones(len(chosen), dtype=torch.bool)))
    none, most = np.mean(teaches["uniform"]), np.mean(teaches["best"])
    assert (np.mean(teaches["drawn"]) - none) / (most - none) > 0.75
