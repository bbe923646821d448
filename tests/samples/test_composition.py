"""Several rewards at once: routing by task, gold rewards, per-reward normalisation, the hacking alarm."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from flowalign.algorithms.parts.credit import group_advantages, per_reward_advantages
from flowalign.config.alignment import AlignConfig
from flowalign.config.section import ConfigError
from flowalign.config.sections import RewardConfig
from flowalign.intake.check_prompts import check_reward_tasks
from flowalign.measure.evaluate import evaluation_metrics
from flowalign.safety.hacking import HackingAlarm
from flowalign.samples.joined import cat_scores
from flowalign.samples.scoring import NamedScorer, load_scorer, merge, reward_metrics, score_images
from rewards.interface import Asked

TASKS = ["position", "counting", "position", "colors"]
ROWS = [{"tag": task} for task in TASKS]
IMAGES = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 8, 8, 3).contiguous() * 10


class Mean:
    """The mean pixel; remembers how many images it saw."""

    name = "mean"

    def __init__(self, sign: float = 1.0, bad: int | None = None) -> None:
        self.sign, self.bad, self.seen = sign, bad, 0

    def score(self, images, prompts, metadata):
        self.seen += len(images)
        values = self.sign * images.mean(axis=(1, 2, 3))
        if self.bad is not None:
            values[self.bad] = np.nan
        return {"mean": values}


def scored(*scorers: NamedScorer):
    parts = [score_images(scorer, Asked(IMAGES.numpy(), [""] * 4, ROWS)) for scorer in scorers]
    return merge(parts, {scorer.name: scorer.weight for scorer in scorers})


def test_a_routed_reward_sees_its_tasks_only_and_adds_to_their_total_only():
    routed = Mean(sign=-1)
    scores = scored(NamedScorer("all", 1.0, Mean()), NamedScorer("where", 0.5, routed, ("position",)))
    assert routed.seen == 2
    assert scores.total.tolist() == [0, 10, 20 - 10, 30]
    assert scores.valid.all()
    assert [math.isnan(v) for v in scores.by_reward["where"].tolist()] == [False, True, False, True]
    assert reward_metrics(scores)["reward/where/mean"] == -10 and not scores.causes


def test_a_sample_that_no_trained_reward_applies_to_is_invalid_not_zero():
    scores = scored(NamedScorer("where", 1.0, Mean(), ("position", "counting")))
    assert scores.valid.tolist() == [True, True, True, False] and math.isnan(scores.total[3])


def test_a_failed_routed_reward_masks_its_own_samples_only():
    scores = scored(NamedScorer("all", 1.0, Mean()), NamedScorer("where", 1.0, Mean(bad=1), ("position",)))
    assert scores.valid.tolist() == [True, True, False, True]
    assert scores.causes == {"where/nan": 1}


def test_chunks_with_and_without_a_task_join_to_one_table():
    scorer = NamedScorer("where", 1.0, Mean(), ("counting",))
    both = NamedScorer("all", 1.0, Mean())
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        own = [score_images(s, Asked(IMAGES[rows].numpy(), [""] * len(ROWS[rows]), ROWS[rows])) for s in (both, scorer)]
        parts.append(merge(own, {"all": 1.0, "where": 1.0}))
    joined = cat_scores(parts)
    assert joined.total.tolist() == [0, 20, 20, 30] and joined.weights == {"all": 1.0, "where": 1.0}


def test_a_gold_reward_is_measured_but_neither_trained_on_nor_able_to_mask(tmp_path):
    (tmp_path / "r.py").write_text("def gold(images, prompts, metadata):\n    return [float('nan')] * len(images)\n")
    gold = load_scorer(RewardConfig(spec="r.py:gold", gold=True, weight=3.0), tmp_path)
    scores = scored(NamedScorer("all", 1.0, Mean()), gold)
    assert scores.total.tolist() == [0, 10, 20, 30] and scores.valid.all()
    assert scores.weights == {"all": 1.0} and "gold" in scores.by_reward


def test_a_run_without_a_trained_reward_is_refused():
    values = {"name": "x", "iterations": 1, "algorithm": {"type": "flow_grpo"}}
    with pytest.raises(ValidationError, match="none is trained on"):
        AlignConfig.model_validate(
            {**values, "rewards": [{"spec": "jpeg", "gold": True}, {"spec": "clip", "weight": 0}]}
        )


GROUPS = [0, 0, 0, 0, 1, 1, 1, 1]


def test_per_reward_normalisation_gives_a_small_reward_its_weight():
    large = torch.tensor([0.0, 100, 0, 100, 0, 100, 0, 100])
    small = torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1])
    valid = torch.ones(8, dtype=torch.bool)
    summed = group_advantages(large + small, valid, GROUPS).values
    assert abs(summed[2] - summed[0]) < 0.03  # the small one is drowned
    credit = per_reward_advantages({"a": large, "b": small}, {"a": 1.0, "b": 1.0}, valid, GROUPS)
    # Each is ±1 within its group; the sum is -2, 0, 0, 2, whose population std is √2.
    expected = torch.tensor([-2.0, 0, 0, 2] * 2) / math.sqrt(2)
    torch.testing.assert_close(credit.values, expected, atol=2e-3, rtol=0)


def test_one_reward_normalised_by_itself_is_the_usual_advantage_up_to_scale():
    rewards = torch.tensor([0.1, 0.5, 0.2, 0.9, 3, 1, 2, 2.5])
    valid = torch.tensor([True] * 7 + [False])
    usual = group_advantages(rewards, valid, GROUPS).values
    own = per_reward_advantages({"r": rewards}, {"r": 2.0}, valid, GROUPS).values
    assert own[7] == 0
    torch.testing.assert_close(own / own[0], usual / usual[0])
    assert abs(float(own[valid].std(correction=0)) - 1) < 1e-3


def test_equal_rewards_have_exactly_no_advantage_per_reward():
    same = torch.ones(8)
    credit = per_reward_advantages({"r": same}, {"r": 1.0}, torch.ones(8, dtype=torch.bool), GROUPS)
    assert not credit.values.any() and credit.zero_std_fraction == 1


def test_a_reward_that_does_not_apply_to_a_group_leaves_the_others_alone():
    everywhere = torch.tensor([0.0, 1, 0, 1, 0, 1, 0, 1])
    here = torch.tensor([0.0, 1, 0, 1] + [float("nan")] * 4)
    credit = per_reward_advantages(
        {"a": everywhere, "b": here}, {"a": 1.0, "b": 1.0}, torch.ones(8, dtype=torch.bool), GROUPS
    )
    first, second = credit.values[:4], credit.values[4:]
    torch.testing.assert_close(first, 2 * second)


def rows(total, gold):
    return [{"reward/total/mean": t, "reward/g/mean": g} for t, g in zip(total, gold, strict=True)]


def rung(history, **options):
    alarm = HackingAlarm(["g"], **options)
    return [alarm.update(row).get("alarm/reward_hacking/g") for row in history]


def noise(seed, count=40, size=0.02):
    return np.random.default_rng(seed).normal(0, size, count)


def test_the_alarm_rings_when_the_trained_reward_rises_and_gold_falls():
    up, down = np.linspace(0.4, 0.8, 40) + noise(0), np.linspace(0.6, 0.3, 40) + noise(1)
    answers = rung(rows(up, down))
    assert answers[:19] == [None] * 19 and answers[-1] == 1.0


@pytest.mark.parametrize("gold", ["rising", "flat"])
def test_the_alarm_stays_silent_while_gold_rises_or_holds(gold):
    up = np.linspace(0.4, 0.8, 40) + noise(0)
    other = np.linspace(0.4, 0.6, 40) + noise(1) if gold == "rising" else np.full(40, 0.5)
    assert 1.0 not in rung(rows(up, other))


def test_the_alarm_stays_silent_when_both_fall():
    down = np.linspace(0.8, 0.4, 40)
    assert 1.0 not in rung(rows(down + noise(0), down + noise(1)))


def test_a_resumed_alarm_answers_as_the_uninterrupted_one():
    up, down = np.linspace(0.4, 0.8, 40) + noise(0), np.linspace(0.6, 0.3, 40) + noise(1)
    history = rows(up, down)
    resumed = HackingAlarm(["g"], history[:25])
    assert [resumed.update(row)["alarm/reward_hacking/g"] for row in history[25:]] == rung(history)[25:]


def test_a_masked_gold_mean_is_left_out_of_the_alarm():
    history = rows(np.linspace(0.4, 0.8, 40), np.linspace(0.6, 0.3, 40))
    history[30]["reward/g/mean"] = float("nan")
    assert rung(history)[-1] == 1.0


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([{"spec": "jpeg", "tasks": ["countin"]}], r"rewards\.0\.tasks: .*'countin'; did you mean counting\?"),
        ([{"spec": "jpeg", "tasks": ["counting"]}], r"rewards: none is for the task 'single_object'"),
        ([{"spec": "jpeg", "tasks": ["counting"]}, {"spec": "geneval", "gold": True}], "none is for the task"),
    ],
)
def test_tasks_that_no_prompt_has_and_prompts_that_no_reward_is_for_are_refused_before_anything_starts(rewards, said):
    with pytest.raises(ConfigError, match=said):
        check_reward_tasks([RewardConfig.model_validate(reward) for reward in rewards], "shapes:train")


def test_a_reward_for_every_prompt_beside_one_for_some_is_fine():
    rewards = [{"spec": "geneval"}, {"spec": "jpeg", "tasks": ["counting", "colors"]}]
    check_reward_tasks([RewardConfig.model_validate(reward) for reward in rewards], "shapes:train")


class Judge:
    """A verdict beside its main score, and one more that a scorer answers where it applies."""

    name = "judge"
    sometimes = ("seldom",)

    def score(self, images, prompts, metadata):
        ones = np.ones(len(images))
        return {
            "judge": ones,
            "strict": ones,
            "seldom": np.where([row["tag"] == "position" for row in metadata], 1, np.nan),
        }


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("tasks", [("position",), ("position", "counting"), ("colors",)])
def test_however_chunks_are_cut_a_scorer_for_some_tasks_tells_the_same_of_them(size, tasks):
    """Chunks without such a task do not ask it, so that its further scores are unknown there and not everywhere."""
    rows = [*ROWS, *ROWS]
    images = IMAGES.repeat(2, 1, 1, 1).numpy()
    scorers = NamedScorer("all", 1.0, Mean()), NamedScorer("judge", 1.0, Judge(), tasks)

    def chunk(own):
        asked = Asked(images[own], [""] * len(rows[own]), rows[own])
        return merge([score_images(s, asked) for s in scorers], {"all": 1.0, "judge": 1.0})

    whole = chunk(slice(None))
    joined = cat_scores([chunk(slice(i, i + size)) for i in range(0, len(rows), size)])
    assert joined.by_reward.keys() == whole.by_reward.keys() and joined.applies.keys() == whole.applies.keys()
    for name, values in whole.by_reward.items():
        torch.testing.assert_close(joined.by_reward[name], values, rtol=0, atol=0, equal_nan=True)
        expected = whole.applies.get(name, torch.ones(len(rows), dtype=torch.bool))
        assert torch.equal(joined.applies.get(name, torch.ones_like(expected)), expected), name
    assert torch.equal(joined.total, whole.total) and joined.owners == whole.owners
    assert evaluation_metrics(joined, rows) == pytest.approx(evaluation_metrics(whole, rows), nan_ok=True)
    assert evaluation_metrics(joined, rows)["eval/strict/overall"] == 1
