"""Guidance that is taught over a range to a network which takes its number by its class."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.algorithms import build_algorithm
from flowalign.config.section import ConfigError
from flowalign.intake.file import load_pretrain
from flowalign.models.guided import frozen, guided
from flowalign.record.metrics import read_metrics
from flowalign.types import LatentBatch
from tests.algorithms.whole import prepare
from tests.families.ours import LENGTH, flowalign, our_policy, write_run
from tests.families.public import initial_noise

Build = Callable[..., Path]
RANGE: dict[str, Any] = {"type": "guidance_distill", "guidance_range": [0.5, 5]}


@pytest.fixture(scope="module")
def teacher(tiny: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of the student's encoders whose network takes no number."""
    path = shutil.copytree(tiny("flux-dev"), tmp_path_factory.mktemp("teacher") / "model")
    shutil.rmtree(path / "transformer")
    shutil.copytree(tiny("flux-schnell") / "transformer", path / "transformer")
    return path


def test_the_target_is_two_passes_of_a_teacher_that_takes_no_number(tiny: Build, teacher: Path) -> None:
    """v_null + g (v_cond - v_null), g of each sample's own and none up to 1; the student is handed g itself."""
    student, other = our_policy(tiny("flux-dev")), our_policy(teacher)
    condition = student.encoders.encode_prompts(["a red cube", "a blue ball", "a green table"] * 2, LENGTH)
    algorithm = build_algorithm(RANGE)
    train = prepare(algorithm, LatentBatch(initial_noise(6, (64, 64)), condition, 3), None, {})
    models = {"policy": guided(student.network), "teacher": frozen(other.network)}
    x, t, g = (train.tensors[name] for name in ("x", "t", "guidance"))
    with torch.no_grad():
        made = algorithm.loss(models, train).loss
        conditional, null = (other.network.velocity(x, t, c) for c in (condition, condition.negative))
        target = null + g.clamp_min(1).view(-1, 1, 1, 1) * (conditional - null)
        own = student.network.velocity(x, t, condition, guidance=g)
    assert (g < 1).any() and (g > 1).any()
    torch.testing.assert_close(made, (own - target).square().mean(), rtol=1e-5, atol=0)


def test_a_network_that_takes_the_number_is_taught_nothing_by_itself(tiny: Build) -> None:
    """A teacher is guided as its family is: what takes a number is handed that of each sample."""
    network = our_policy(tiny("flux-dev"))
    condition = network.encoders.encode_prompts(["a red cube", "a blue ball"], LENGTH)
    algorithm = build_algorithm(RANGE)
    train = prepare(algorithm, LatentBatch(initial_noise(2, (64, 64)), condition, 3), None, {})
    models = {"policy": guided(network.network), "teacher": frozen(network.network)}
    assert algorithm.loss(models, train).loss.item() == 0


def test_a_range_is_distilled_into_flux_dev(tiny: Build, teacher: Path, tmp_path: Path) -> None:
    write_run(tmp_path, teacher)
    made = ["--prompts", tmp_path / "prompts.jsonl", "--pairs", "4", "--num-steps", "1"]
    flowalign("make-pairs", teacher, "--to", tmp_path / "bank", *made, "--config", tmp_path / "run.yaml")
    size = f"max_sequence_length: {LENGTH}, height: 64, width: 64"
    path = tmp_path / "distill.yaml"
    path.write_text(
        f"name: taught\niterations: 2\nruns_dir: {tmp_path / 'runs'}\nlatents: bank\n"
        f"model: {{path: {tiny('flux-dev')}, {size}, lora: {{rank: 4}}}}\n"
        f"teacher: {{path: {teacher}, {size}}}\n"
        "algorithm: {type: guidance_distill, guidance_range: [1, 5]}\n"
        "learner: {batch_size: 4, micro_batch_size: 4, engine: torch}\n"
        "cluster: {backend: local, threads: 1}\n"
    )
    flowalign("distill", path)
    rows = read_metrics(tmp_path / "runs" / "taught" / "metrics.jsonl")
    assert rows[-1]["iteration"] == 2 and rows[-1]["loss/velocity_mse"] > 0
    asked = ["--prompt", "a red cube", "--num-steps", "2", "--guidance-scale", "3", "--out", tmp_path / "out"]
    assert "guidance 3" in flowalign("sample", tmp_path / "runs" / "taught", *asked)
    said = (
        r"^model\.path: guidance_distill with these options needs a network that takes guidance, and that of this FLUX"
    )
    with pytest.raises(ConfigError, match=said):
        load_pretrain(path, [f"model.path={teacher}"])
