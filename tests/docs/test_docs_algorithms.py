"""``docs/algorithms.md`` says what is: its example trains, its table of measurements is that of the files."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flowalign.algorithm import prepared
from flowalign.algorithms import build_algorithm
from flowalign.intake.file import load_align
from flowalign.record.metrics import read_metrics
from flowalign.types import LatentBatch
from tests.algorithms.every import every_algorithm
from tests.algorithms.seams.toys import Given, decoder, warmth
from tests.algorithms.toy import LinearVelocity

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
ALIGN = [name for name, own in every_algorithm().items() if own.needs.batch is not LatentBatch]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


def commands(part: str) -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", "").splitlines()]
    return [shlex.split(line) for line in lines if part in line]


def test_the_example_is_one_file_that_trains(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "my_algorithm.py").write_text(next(block for block in blocks("python") if "my_algorithm.py" in block))
    (tmp_path / "own.py").write_text(
        "def bright(images, prompts, metadata):\n    return images.mean((1, 2, 3)) / 255\n"
    )
    written = next(words for words in commands("my_algorithm.py") if words[1] == "align")
    assert (ROOT / written[2]).is_file()
    small = {
        "model": {"path": str(tiny_pipeline_dir), "max_sequence_length": 4, "dtype": "float32"},
        "data.groups_per_iteration": 2,
        "rewards": [{"spec": "own.py:bright"}],
        "rollout": {"chunk_size": 8},
        "learner": {"engine": "torch", "micro_batch_size": 8},
        "cluster": {"backend": "local", "threads": 1},
        "evaluation": {"every": 0},
        "checkpoint": {"best_metric": "reward/total/mean"},
        "logging.wandb": "disabled",
        "iterations": 2,
    }
    keys = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in small.items()]
    command = [sys.executable, "-m", "flowalign.cli", "align", str(ROOT / written[2]), *written[3:], *keys]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_metrics(tmp_path / "runs" / "reinforce" / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [1, 2]
    assert all(row["learner/transitions"] == 2 * 8 * 3 and row["loss/reinforce"] != 0 for row in rows)


def test_the_example_without_rollouts_learns_by_the_reward_s_gradient(tmp_path: Path) -> None:
    (tmp_path / "last_step.py").write_text(next(block for block in blocks("python") if "last_step.py" in block))
    algorithm = build_algorithm({"type": f"{tmp_path / 'last_step.py'}:LastStep"})
    policy, source = LinearVelocity(), algorithm.source(Given())
    assert source.batch(1).batch == Given().batch(0).batch and source.batch(2).batch == Given().batch(1).batch
    models: Any = {"policy": policy, "decoder": decoder, "reward": warmth}
    with torch.no_grad():
        _, items = prepared(algorithm, source.batch(0), None, models)
    algorithm.loss(models, items).loss.backward()
    assert policy.bias.grad is not None and bool((policy.bias.grad != 0).all())


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "shapes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_page_s_algorithms_have_a_configuration_that_loads(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    if content["algorithm"]["type"] in ALIGN:
        loaded = load_align(path, require_files=False)
        assert loaded.config.algorithm["type"] == content["algorithm"]["type"]


def test_the_table_is_made_of_the_committed_cells() -> None:
    directory = ROOT / "scripts" / "benchmarks"
    code = (
        "import algorithms, algorithms_table as t\n"
        "cells = t.load(algorithms.OWN, {name: cell.title for name, cell in algorithms.CELLS.items()})\n"
        "print(t.markdown(cells))"
    )
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=directory, capture_output=True, text=True, check=True
    ).stdout
    assert made.strip() in PAGE
