from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flowalign.measure.evaluate import EvaluationResult, evaluate_checkpoint, evaluation_metrics, write_results_jsonl
from flowalign.models.build import load_network, load_policy
from flowalign.record.checkpoint import CheckpointError
from flowalign.samples.opened import load_weights
from flowalign.samples.rollout import SampleNoise
from flowalign.samples.sampled import sample_checkpoint, sampled_model
from flowalign.types import Scores
from tests.tiny import run_config, write_checkpoint, write_pipeline

NAN = math.nan


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("base") / "tiny-sd3")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    write_checkpoint(directory, run_config(base), step=5)
    write_checkpoint(directory, run_config(base), step=10)
    return directory


@pytest.fixture(scope="module")
def result(base: Path, run: Path) -> EvaluationResult:
    return evaluate_checkpoint(sampled_model(run, run_config(base)))


def test_a_scorer_for_some_tasks_is_not_asked_to_explain_prompts_that_it_cannot_judge(
    base: Path, run: Path, tmp_path: Path
) -> None:
    judged = {"tag": "colors", "include": [{"class": "star", "count": 1, "color": "red"}]}
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a poem", "tag": "texts"}, {"prompt": "a photo of a red star", **judged}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = run_config(
        base,
        rollout={"chunk_size": 1},
        evaluation={"num_samples": 3, "num_steps": 2, "scorer": {"spec": "geneval", "tasks": ["colors"]}},
    )
    found = evaluate_checkpoint(sampled_model(run, config), prompts=str(prompts))
    assert [row["tag"] for row in found.rows] == ["texts", "colors", "texts"]
    assert [row["score"] is None for row in found.rows] == [True, False, True]
    assert [row["reason"] == "" and not row["correct"] for row in found.rows][::2] == [True, True]
    strict = found.rows[1]["score"] if found.rows[1]["correct"] else 0.0
    assert found.metrics["eval/geneval_strict/overall"] == found.metrics["eval/geneval_strict/colors"] == strict
    assert not [key for key in found.metrics if key.endswith("/texts")]


def scores(**by_reward: list[float]) -> Scores:
    tensors = {name: torch.tensor(values) for name, values in by_reward.items()}
    total = next(iter(tensors.values()))
    return Scores(tensors, total, torch.isfinite(total))


def test_the_overall_is_the_mean_of_the_tasks_not_of_the_samples() -> None:
    metadata = [{"tag": "colors"}, {"tag": "counting"}, {"tag": "counting"}, {"tag": "counting"}]
    metrics = evaluation_metrics(scores(geneval=[1.0, 0.0, 0.0, 1.5]), metadata)
    assert metrics == {"eval/geneval/overall": 0.75, "eval/geneval/colors": 1.0, "eval/geneval/counting": 0.5}


def test_masked_samples_are_left_out_of_the_mean_of_their_reward_only() -> None:
    metrics = evaluation_metrics(scores(a=[1.0, NAN], b=[0.0, 1.0]), [{"tag": "x"}, {"tag": "x"}])
    assert (metrics["eval/a/x"], metrics["eval/b/x"]) == (1.0, 0.5)


def test_a_task_without_a_valid_sample_makes_the_overall_nan() -> None:
    metrics = evaluation_metrics(scores(a=[1.0, NAN]), [{"tag": "x"}, {"tag": "y"}])
    assert metrics["eval/a/x"] == 1.0
    assert math.isnan(metrics["eval/a/y"]) and math.isnan(metrics["eval/a/overall"])


def test_rows_without_a_tag_get_a_plain_mean() -> None:
    assert evaluation_metrics(scores(a=[1.0, 0.0, 0.5]), [{}, {}, {}]) == {"eval/a/overall": 0.5}


def test_an_evaluation_covers_every_task_and_names_its_checkpoint(result: EvaluationResult) -> None:
    assert result.iteration == 10
    assert {row["tag"] for row in result.rows} == {key.split("/")[2] for key in result.metrics} - {"overall"}
    assert len(result.rows) == 12 and result.images.shape == (12, 64, 64, 3)
    by_task: dict[str, list[bool]] = {}
    for row in result.rows:
        by_task.setdefault(row["tag"], []).append(row["correct"])
    overall = np.mean([np.mean(values) for values in by_task.values()])
    assert result.metrics["eval/geneval/overall"] == pytest.approx(overall)


def test_the_same_evaluation_twice_is_bitwise_equal(base: Path, run: Path, result: EvaluationResult) -> None:
    again = evaluate_checkpoint(sampled_model(run / "checkpoints" / "step_000010", run_config(base)))
    assert torch.equal(again.images, result.images) and again.rows == result.rows


def test_base_pipeline_model_and_ema_are_three_different_evaluations(
    base: Path, run: Path, result: EvaluationResult
) -> None:
    plain = evaluate_checkpoint(sampled_model(base, run_config(base)))
    averaged = evaluate_checkpoint(sampled_model(run, run_config(base), which="ema"))
    assert plain.iteration is None
    assert not torch.equal(plain.images, result.images) and not torch.equal(averaged.images, result.images)


@pytest.mark.parametrize("which", ["ema", "nonsense"])
def test_a_pipeline_has_no_weights_to_choose(base: Path, tmp_path: Path, which: str) -> None:
    with pytest.raises(CheckpointError, match=f"--weights: .* is a pipeline, .* not {which}"):
        sample_checkpoint(sampled_model(base, run_config(base), which=which), ["a"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_base_pipeline_is_evaluated_without_the_runs_lora(base: Path) -> None:
    small = {"num_samples": 3, "num_steps": 2}
    configs = [run_config(base, lora=lora, evaluation=small) for lora in (False, True)]
    made = [evaluate_checkpoint(sampled_model(base, config)) for config in configs]
    assert torch.equal(made[0].images, made[1].images)


def test_results_are_written_in_the_public_benchmarks_format(result: EvaluationResult, tmp_path: Path) -> None:
    write_results_jsonl(result.rows, tmp_path / "results.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {"filename", "tag", "prompt", "correct", "reason", "metadata"} <= set(rows[0])
    assert all(json.loads(row["metadata"])["prompt"] == row["prompt"] for row in rows)
    assert all(row["correct"] or row["reason"] for row in rows)


def test_progress_is_told_after_each_chunk(base: Path) -> None:
    told: list[tuple[int, int]] = []
    evaluate_checkpoint(
        sampled_model(base, run_config(base), num_steps=1),
        num_samples=10,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(8, 10), (10, 10)]


def test_samples_are_saved_with_the_noise_that_made_them(base: Path, run: Path, tmp_path: Path) -> None:
    files = sample_checkpoint(
        sampled_model(run, run_config(base), seed=3),
        ["a photo of a circle", "a photo of a star"],
        tmp_path / "out",
        num_images=2,
        save_latents=True,
    )
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [row["prompt"] for row in index] == ["a photo of a circle"] * 2 + ["a photo of a star"] * 2
    assert [file.name for file in files] == [row["file"] for row in index]
    saved = load_file(tmp_path / "out" / "latents.safetensors")
    assert torch.equal(saved["noise"], SampleNoise(3, range(4), (16, 8, 8)).draw())
    policy = load_policy(run_config(base).model)
    with Image.open(files[2]) as image:
        assert torch.equal(torch.from_numpy(np.array(image)), policy.encoders.decode(saved["latents"])[2])


def test_weights_of_another_model_are_refused(base: Path, run: Path) -> None:
    policy = load_policy(run_config(base, lora=True).model)
    with pytest.raises(CheckpointError, match="does not fit the configured model"):
        load_weights(policy.network, run / "checkpoints" / "step_000010")


def test_a_checkpoint_without_ema_says_so(base: Path, run: Path, tmp_path: Path) -> None:
    from flowalign.record.checkpoint import load
    from flowalign.record.checkpointwriter import CheckpointWriter

    saved = load(run / "checkpoints" / "step_000010")
    path = CheckpointWriter(tmp_path).save(1, model=saved.model, state=saved.state)
    with pytest.raises(CheckpointError, match="no ema weights"):
        load_weights(load_network(run_config(base).model), path, "ema")


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_path_that_holds_nothing_is_refused_in_one_sentence(base: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="give a run directory"):
        evaluate_checkpoint(sampled_model(tmp_path / name, run_config(base)))
