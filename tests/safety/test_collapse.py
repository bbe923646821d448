"""What a collapse looks like, which alarm names it, and where it stops a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowalign.config.run import SafetyConfig
from flowalign.config.sections import SHIPPED
from flowalign.record import checkpoint
from flowalign.record.checkpointwriter import CheckpointWriter
from flowalign.run.previews import looked_at, preview_of
from flowalign.safety.collapse import CollapseAlarm
from flowalign.safety.signals import (
    CollapseSignals,
    evenly,
    mean_distance,
    members,
    saturation,
    some_of_each,
    thumbnails,
)
from flowalign.types import Pictures, PromptBatch, Samples, SamplingPlan, Scores, Trajectories
from tests.conditions import text_condition

NAN = math.nan


def solid(*colors: tuple[int, int, int], side: int = 32) -> np.ndarray:
    """Images of one colour each, uint8 (N, side, side, 3)."""
    return np.broadcast_to(np.array(colors, np.uint8)[:, None, None], (len(colors), side, side, 3)).copy()


def signals(images: np.ndarray, group_ids: tuple[int, ...], scores: Scores, **safety: Any) -> dict[str, float]:
    """Signals of the preview that a rollout worker makes of the images."""
    n, nothing, config = len(images), torch.zeros(len(images), 1), SafetyConfig(**safety)
    batch, plan = PromptBatch(("",) * n, group_ids, tuple(range(n)), ({},) * n), SamplingPlan((1.0, 0.0))
    condition = text_condition(nothing[:, None], nothing, torch.arange(n), nothing[:1], nothing[0])
    walked = Trajectories(batch, condition, plan, nothing, nothing, nothing, 0, 0)
    (seen,) = looked_at([batch], plan, config, evaluation=False)
    preview = preview_of(Samples(Pictures(batch, torch.from_numpy(images)), walked), seen)
    assert len(preview.images) == len(seen) <= config.clip_images
    return CollapseSignals(config)(group_ids, preview, scores)


def scored(*totals: float) -> Scores:
    total = torch.tensor(totals)
    return Scores({"r": total}, total, torch.isfinite(total))


BLACK, WHITE, RED, PINK = (0, 0, 0), (255, 255, 255), (255, 0, 0), (200, 100, 100)


def test_the_signals_of_a_batch_computed_by_hand() -> None:
    # Groups 7: black and white, distance 1. Group 9: red twice and pink once, of which two pairs differ.
    images = solid(BLACK, RED, WHITE, RED, PINK)
    measured = signals(images, (7, 9, 7, 9, 9), scored(0.25, 0.5, 0.75, NAN, 1.0))
    pink = math.sqrt(((55 / 255) ** 2 + 2 * (100 / 255) ** 2) / 3)
    assert measured == {
        "collapse/saturation": pytest.approx((0 + 1 + 0 + 1 + 0.5) / 5),
        "collapse/best_of_group": pytest.approx((0.75 + 1.0) / 2),
        "collapse/reward_spread": pytest.approx(np.std([0.25, 0.5, 0.75, 1.0])),
        "collapse/diversity": pytest.approx((1 + 2 / 3 * pink) / 2),
    }


def test_without_rewards_or_pairs_only_the_saturation_is_measured() -> None:
    nothing = torch.full((2,), NAN)
    measured = signals(solid(RED, WHITE), (1, 2), Scores({}, nothing, nothing > 0))
    assert measured == {"collapse/saturation": 0.5}


def test_a_group_without_a_valid_reward_is_left_out_of_the_best() -> None:
    images, groups = solid(RED, RED, RED, RED), (1, 1, 2, 2)
    assert signals(images, groups, scored(NAN, NAN, 0.5, 0.25))["collapse/best_of_group"] == 0.5
    assert math.isnan(signals(images, groups, scored(*[NAN] * 4))["collapse/best_of_group"])


def test_large_images_have_the_figures_of_small_ones() -> None:
    small = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    large = small.repeat(8, 1).repeat(8, 2)
    assert saturation(large) == saturation(small)
    assert np.array_equal(thumbnails(large), thumbnails(small))


def test_diversity_by_clip_is_one_minus_the_cosine_of_its_features() -> None:
    from rewards.models.openclip import OpenClip

    directory = str(SHIPPED / "open_clip")
    images = np.concatenate(
        [np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8), solid(RED, RED, side=64)]
    )
    features = OpenClip("test", path=directory).images(images).detach().double()
    groups, scores = (1, 1, 2, 2), scored(0, 0, 0, 0)
    measured = signals(images, groups, scores, clip=directory)["collapse/diversity"]
    assert measured == pytest.approx((1 - float(features[0] @ features[1])) / 2, rel=1e-3)
    few = signals(images, groups, scores, clip=directory, clip_images=2)["collapse/diversity"]
    assert few == pytest.approx(2 * measured, rel=1e-3)


def test_the_images_that_clip_sees_are_spread_over_groups_and_within_them() -> None:
    groups = members([i // 8 for i in range(64)])
    assert some_of_each(groups, 8) == [[0, 2, 4, 6], [32, 34, 36, 38]]
    assert some_of_each(groups, 1000) == [evenly(group, 4) for group in groups]
    assert some_of_each([[0], [1, 2]], 8) == [[1, 2]] and some_of_each([[0], [1]], 8) == []
    assert mean_distance(np.eye(3), [[0], [1]]) != mean_distance(np.eye(3), [[0], [1]])  # NaN


def rows(count: int, seed: int = 0, **figures: Any) -> list[dict[str, Any]]:
    """Metrics of a run: each figure a number, or a list with one an iteration, and noise of 2 % on each."""
    usual = {"diversity": 0.3, "saturation": 0.4, "best_of_group": 0.6, "reward_spread": 0.3, **figures}
    invalid = usual.pop("invalid", 0.0)
    noise = np.random.default_rng(seed)
    made = []
    for i in range(count):
        at = {key: value[i] if isinstance(value, (list, np.ndarray)) else value for key, value in usual.items()}
        row: dict[str, Any] = {f"collapse/{key}": v * (1 + 0.02 * noise.normal()) for key, v in at.items()}
        made.append({"iteration": i + 1, **row, "reward/invalid_fraction": invalid})
    return made


def answers(metrics: list[dict[str, Any]], **config: Any) -> list[dict[str, float]]:
    alarm = CollapseAlarm(SafetyConfig(**config))
    return [alarm.update(row["iteration"], row) for row in metrics]


def final(metrics: list[dict[str, Any]], **config: Any) -> dict[str, float]:
    return {key.removeprefix("alarm/"): on for key, on in answers(metrics, **config)[-1].items()}


HEALTHY = {"diversity": 0.0, "saturation": 0.0, "best_of_group": 0.0, "non_finite_reward": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "diversity": {"diversity": np.linspace(0.3, 0.05, 40)},
    "saturation": {"saturation": np.linspace(0.4, 0.9, 40)},
    "best_of_group": {"best_of_group": [*np.linspace(0.4, 0.8, 20), *np.linspace(0.8, 0.3, 20)]},
    "non_finite_reward": {"invalid": 0.25},
}


@pytest.mark.parametrize("cause", CASES)
def test_a_collapse_is_named_after_its_cause_and_no_other(cause: str) -> None:
    assert final(rows(40, **CASES[cause])) == {**HEALTHY, cause: 1.0}


def test_colours_that_fade_are_a_drift_as_well() -> None:
    assert final(rows(40, saturation=np.linspace(0.6, 0.1, 40)))["saturation"] == 1.0


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_rings_nothing(seed: int) -> None:
    """Rewards rise, diversity falls to two thirds, colours move by 0.1."""
    moving: dict[str, Any] = {"best_of_group": np.linspace(0.4, 0.9, 100), "diversity": np.linspace(0.3, 0.2, 100)}
    run = rows(100, seed, saturation=np.linspace(0.3, 0.4, 100), **moving)
    assert not any(any(answer.values()) for answer in answers(run))


def test_a_fall_within_the_noise_of_few_iterations_rings_nothing() -> None:
    noisy: dict[str, Any] = {
        "diversity": [0.1, 0.6, 0.2, 0.01, 0.25, 0.1],
        "saturation": [0.0, 0.6, 0.1, 0.2, 0.9, 0.4],
    }
    assert final(rows(6, best_of_group=[0.1, 1.9, 0.4, 0.1, 0.5, 0.2], **noisy), window=3) == HEALTHY


def test_a_fall_that_began_within_the_first_block_is_seen_where_no_value_overlaps() -> None:
    alarm = CollapseAlarm(SafetyConfig(window=3))
    values = (0.188, 0.093, 0.058, 0.02, 0.005, 0.001)
    rows = [{"collapse/saturation": 0.3, "collapse/diversity": value} for value in values]
    said = [alarm.update(i + 1, row) for i, row in enumerate(rows)]
    assert said[-1]["alarm/diversity"] == 1


def test_one_odd_iteration_does_not_widen_the_measure_of_a_fall_in_reward() -> None:
    alarm = CollapseAlarm(SafetyConfig(window=3))
    fallen = [(1.0, 0.1)] * 3 + [(0.5, 0.1), (0.5, 0.1), (0.51, 9.0)]
    said = [
        alarm.update(
            i + 1, {"collapse/saturation": 0.3, "collapse/best_of_group": best, "collapse/reward_spread": spread}
        )
        for i, (best, spread) in enumerate(fallen)
    ]
    assert said[-1]["alarm/best_of_group"] == 1


def test_rewards_that_were_all_equal_may_become_unequal() -> None:
    best, spread = [1.0] * 10 + [0.99] * 10, [0.0] * 10 + [0.1] * 10
    alarm = CollapseAlarm(SafetyConfig())
    for row in rows(20):
        row |= {
            "collapse/best_of_group": best[row["iteration"] - 1],
            "collapse/reward_spread": spread[row["iteration"] - 1],
        }
        alarm.update(row["iteration"], row)
    assert alarm.found == []


def test_alarms_appear_with_the_first_block_that_can_be_judged_and_hold_until_the_next() -> None:
    seen = answers(rows(30, diversity=[0.3] * 10 + [0.1] * 10 + [0.3] * 10))
    assert seen[8] == {} and seen[9] == {"alarm/non_finite_reward": 0.0} == seen[18]
    assert [answer["alarm/diversity"] for answer in seen[19:]] == [1.0] * 10 + [0.0]


def test_a_run_whose_rewards_were_never_finite_is_said_to_be_so_and_judged_by_its_images() -> None:
    run = [{**row, "collapse/best_of_group": None} for row in rows(20, invalid=1.0)]
    assert final(run) == {"non_finite_reward": 1.0, "diversity": 0.0, "saturation": 0.0}


def test_a_finding_says_before_and_after_and_what_to_try() -> None:
    alarm = CollapseAlarm(SafetyConfig())
    for row in rows(20):
        alarm.update(row["iteration"], {**row, "collapse/diversity": 0.25 if row["iteration"] <= 10 else 0.0625})
    assert [found.sentence for found in alarm.found] == [
        "the images of a group differ by 0.0625 (iterations 11 to 20), at first 0.25 (iterations 1 to 10); "
        "the policy makes ever the same image of a prompt: lower learner.optimizer.learning_rate or raise "
        "algorithm.beta"
    ]


def test_the_last_good_iteration_ends_the_last_block_in_which_nothing_rang() -> None:
    alarm, good = CollapseAlarm(SafetyConfig(window=5, stop=True)), []
    for row in rows(30, diversity=[0.3] * 10 + [0.1] * 5 + [0.3] * 5 + [0.1] * 10):
        alarm.update(row["iteration"], row)
        good.append((alarm.good_until, alarm.stopping()))
    assert [good[i] for i in (3, 4, 9, 14, 19, 24, 28)] == [
        *((0, None), (5, None), (10, None), (10, None), (20, None), (20, None), (20, None)),
    ]
    assert good[29] == (20, "diversity")


def test_reward_hacking_counts_as_an_alarm_that_holds() -> None:
    alarm = CollapseAlarm(SafetyConfig(stop=True))
    for row in rows(40):
        alarm.update(row["iteration"], {**row, "alarm/reward_hacking/taste": float(row["iteration"] > 15)})
    assert (alarm.good_until, alarm.stopping()) == (10, "reward_hacking/taste")


def test_without_stop_no_alarm_ends_a_run() -> None:
    alarm = CollapseAlarm(SafetyConfig(), rows(200, diversity=[0.3] * 10 + [0.0] * 190))
    assert len(alarm.history) == 19 and alarm.stopping() is None


@pytest.mark.parametrize("cut", [7, 10, 23, 30])
def test_a_resumed_alarm_answers_as_the_uninterrupted_one(cut: int) -> None:
    run = [row for cause in CASES.values() for row in rows(40, **cause)]
    run = json.loads(json.dumps([{**row, "iteration": i + 1} for i, row in enumerate(run)]))
    resumed = CollapseAlarm(SafetyConfig(), run[:cut])
    assert [resumed.update(row["iteration"], row) for row in run[cut:]] == answers(run)[cut:]


def save(writer: CheckpointWriter, step: int) -> None:
    writer.save(step, model={"w": torch.zeros(1)}, state={})


def test_the_last_good_checkpoint_outlives_the_newer_ones(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=1)
    for step in (1, 2):
        save(writer, step)
    writer.mark_good(2)
    for step in (3, 4, 5):
        save(writer, step)
    assert checkpoint.steps(tmp_path) == [2, 5] and checkpoint.last_good(tmp_path) == tmp_path / "step_000002"
    writer.mark_good(5)
    assert checkpoint.steps(tmp_path) == [5]
    writer.mark_good(None)
    assert checkpoint.last_good(tmp_path) is None and checkpoint.latest(tmp_path) == tmp_path / "step_000005"


def test_a_last_good_checkpoint_that_is_written_anew_is_no_longer_vouched_for(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    save(writer, 1)
    writer.mark_good(1)
    save(writer, 1)
    assert checkpoint.last_good(tmp_path) is None
