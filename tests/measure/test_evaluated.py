"""What an evaluation says of itself, so that 12 samples do not look like a benchmark."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.config.sections import CacheConfig, SamplingConfig
from flowalign.measure.evaluate import evaluation_metrics
from flowalign.measure.evaluated import counts, facts, made_with, said_error, skipped, standard_errors, text
from flowalign.types import Scores, Trajectories
from tests.tiny import write_pipeline

NAN = math.nan


def scores(**by_reward: list[float]) -> Scores:
    tensors = {name: torch.tensor(values) for name, values in by_reward.items()}
    return Scores(tensors, next(iter(tensors.values())), torch.ones(len(next(iter(tensors.values())))) > 0)


def rollouts(*counts: tuple[int, int]) -> list[Any]:
    return [type("Made", (), {"computed": computed, "reused": reused}) for computed, reused in counts]


def test_the_standard_error_of_a_task_and_of_the_mean_of_tasks_are_those_of_the_textbook():
    found = standard_errors(
        scores(a=[1, 0, 1, 0, 3, 5]), [{"tag": "x"}] * 4 + [{"tag": "y"}] * 2
    )  # x: stdev sqrt(1/3) over 4; y: sqrt(2) over 2
    x, y = math.sqrt(1 / 3) / 2, 1.0
    assert found == pytest.approx(
        {
            "standard_error/a/x": x,
            "standard_error/a/y": y,
            "standard_error/a/overall": math.sqrt(x**2 + y**2) / 2,
        }
    )


@pytest.mark.parametrize("values", [[1.0], [NAN, NAN], [1.0, NAN]])
def test_below_two_valid_samples_no_error_is_known(values: list[float]):
    assert math.isnan(standard_errors(scores(a=values), [{}] * len(values))["standard_error/a/overall"])


def test_masked_samples_do_not_count_in_the_error():
    whole, masked = scores(a=[0.0, 1.0]), scores(a=[0.0, NAN, 1.0])
    assert standard_errors(whole, [{}] * 2) == standard_errors(masked, [{}] * 3)


def test_samples_of_one_prompt_count_together_and_valid_ones_are_counted():
    own, metadata = scores(a=[1.0, 1.0, 0.0, 0.0, NAN, 1.0]), [{"tag": "x"}] * 4 + [{"tag": "y"}] * 2
    apart = standard_errors(own, metadata)["standard_error/a/x"]
    together = standard_errors(own, metadata, ["p", "p", "q", "q", "p", "r"])["standard_error/a/x"]
    assert (apart, together) == pytest.approx((math.sqrt(1 / 3) / 2, 0.5))
    assert counts(own, metadata) == {"num_samples/a/overall": 5, "num_samples/a/x": 4, "num_samples/a/y": 1}


def test_a_row_without_a_tag_is_of_its_task_and_a_tag_goes_first():
    own = scores(a=[1.0, 0.0, 0.0, 1.0])
    metadata = [{"task": "x"}, {"tag": "", "task": "x"}, {"tag": "y", "task": "x"}, {}]
    assert evaluation_metrics(own, metadata) == pytest.approx(
        {"eval/a/x": 0.5, "eval/a/y": 0.0, "eval/a/untagged": 1.0, "eval/a/overall": 0.5}
    )
    assert counts(own, metadata) == {
        "num_samples/a/x": 2,
        "num_samples/a/y": 1,
        "num_samples/a/untagged": 1,
        "num_samples/a/overall": 4,
    }
    assert standard_errors(own, metadata)["standard_error/a/x"] == pytest.approx(0.5)


def test_samples_that_are_all_alike_are_said_to_be_so_and_not_to_be_certain():
    own = scores(a=[1, 1, 1, 1, 0, 1, 0, 0], b=[1, 1, 1, 1, 0, 0, 0, 0], c=[0, 1, 0, 1, 0, 1, 0, 1])
    found = standard_errors(own, [{"tag": "x"}] * 4 + [{"tag": "y"}] * 4)
    keys = {key.removeprefix("standard_error/"): said_error(key, found, 4, 4) for key in found}
    assert keys == {
        "a/x": " (all alike, of 4)",
        "a/y": " ± 0.2500",
        "a/overall": " ± 0.1250 or more",
        "b/x": " (all alike, of 4)",
        "b/y": " (all alike, of 4)",
        "b/overall": " (all alike within a task)",
        "c/x": " ± 0.2887",
        "c/y": " ± 0.2887",
        "c/overall": " ± 0.2041",
    }
    assert said_error("standard_error/fid", found, 4) == ""
    one = standard_errors(scores(a=[1.0]), [{}])
    assert said_error("standard_error/a/overall", one, 3) == ""


def test_the_line_names_samples_prompts_steps_guidance_solver_seed_and_weights():
    sampling = SamplingConfig(num_steps=28, guidance_scale=4.5, solver="heun")
    prompts = [f"prompt {i % 6}" for i in range(12)]
    said = facts(prompts, "geneval.jsonl", 553, sampling, seed=7, weights="ema", walked=rollouts((0, 0)), seconds=3)
    assert text(said) == (
        "12 samples of 6 of 553 prompts (geneval.jsonl); 28 steps of heun, guidance 4.5, seed 7, weights: ema; 4 img/s"
    )


def test_with_a_cache_the_share_of_skipped_steps_is_said():
    cache = CacheConfig(calibration="c.json", threshold=0.2)
    said = facts(
        ["a"],
        "p",
        1,
        SamplingConfig(cache=cache),
        seed=0,
        weights="model",
        walked=rollouts((6, 2), (0, 8)),
        seconds=1,
    )
    assert said["cache"] == {"calibration": "c.json", "threshold": 0.2, "skipped_steps": 10 / 16}
    assert text(said).endswith("; 62% of the steps skipped by the cache, threshold 0.2")


def test_no_evaluation_skips_nothing():
    assert skipped([]) == skipped(rollouts((0, 0))) == 0.0


def test_one_step_is_one_step():
    made = SamplingConfig(num_steps=1).model_dump() | {"seed": 0, "weights": "model"}
    assert made_with(made) == "1 step of euler, guidance 1, seed 0, weights: model"


def test_evaluate_says_and_writes_how_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_pipeline(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    asked = ["--num-samples", "8", "--num-steps", "2", "--seed", "3", "--out", "out", "--json"]
    done = CliRunner().invoke(app, ["evaluate", "base", *asked])
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for summary in (printed, written):
        made = summary["made"]
        assert made["num_samples"] == made["num_prompts"] == 8 and made["prompts_there"] > 8
        assert (made["num_steps"], made["seed"], made["weights"]) == (2, 3, "model") and made["images_per_s"] > 0
        for beside, head in (("standard_errors", "standard_error"), ("num_samples", "num_samples")):
            assert summary["metrics"].keys() == {key.replace(head, "eval") for key in summary[beside]}
        assert made["judges"][0]["name"] == "geneval" and made["size"] == [64, 64]
    said = done.stderr.splitlines()
    assert sum(line.startswith("eval/geneval/") and line.endswith(" samples") for line in said) == 7
    assert (
        said[0].startswith("8 samples of 8 of ") and "2 steps of euler, guidance 1, seed 3, weights: model" in said[0]
    )


def test_rollouts_without_a_cache_count_nothing():
    assert (Trajectories.computed, Trajectories.reused) == (0, 0)
