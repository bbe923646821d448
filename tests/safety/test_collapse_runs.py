"""Real runs that collapse: they warn, stop with a last good checkpoint, and resume with the same alarms."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.config.section import ConfigError
from flowalign.config.sections import SHIPPED
from flowalign.intake.file import load_align
from flowalign.intake.run_directory import begin_run
from flowalign.record import checkpoint
from flowalign.record.checkpointwriter import CheckpointWriter
from flowalign.record.metrics import read_metrics, without_times
from flowalign.report import write_report
from flowalign.run.drive import drive
from tests.tiny import write_config

REWARD = """
def bright(images, prompts, metadata):
    return images.reshape(len(images), -1).mean(1) / 255.0

def red(images, prompts, metadata):
    return images[..., 0].reshape(len(images), -1).mean(1) / 255.0
"""


def write_run(folder: Path, pipeline: Path, name: str, **changes: Any) -> Path:
    """The file of a run of 8 images an iteration; a rate that climbs to 0.05 carries the tiny model away."""
    (folder / "reward.py").write_text(REWARD)
    content = {
        "name": name,
        "runs_dir": str(folder / "runs"),
        "iterations": 12,
        "model": {"path": str(pipeline), "max_sequence_length": 16},
        "data": {"groups_per_iteration": 2},
        "algorithm": {"type": "flow_grpo", "group_size": 4, "num_steps": 3},
        "rewards": [{"spec": "reward.py:bright"}, {"spec": "reward.py:red", "gold": True}],
        "rollout": {"chunk_size": 8},
        "learner": {"engine": "torch", "micro_batch_size": 8, "optimizer": {"learning_rate": 0.05, "warmup_steps": 10}},
        "evaluation": {"every": 0},
        "checkpoint": {"every": 1, "keep_last": 1, "keep_best": 0},
        "cluster": {"backend": "local", "threads": 1},
        "logging": {"wandb": "disabled"},
        "safety": {"window": 3, "stop": True},
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def align(*arguments: Any) -> tuple[int, str]:
    """Exit code and output of ``flowalign``."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.output


def figures(run_dir: Path) -> list[dict[str, Any]]:
    return [without_times(row) for row in read_metrics(run_dir / "metrics.jsonl")]


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline_dir: Path) -> Path:
    """A collapsing run that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    loaded = load_align(write_run(folder, tiny_pipeline_dir, "collapsing", safety={"window": 3}))
    return drive(loaded.config, loaded.base_dir, Console(quiet=True))


def test_a_collapsing_run_warns_stops_and_leaves_commands_that_work(
    tmp_path: Path, tiny_pipeline_dir: Path, whole: Path
) -> None:
    file, run = write_run(tmp_path, tiny_pipeline_dir, "collapsing"), tmp_path / "runs" / "collapsing"
    code, said = align("align", file)
    assert code == 3
    assert "warning at iteration 6: the images of a group differ by" in said
    assert "stopping after iteration 9: alarm/diversity has held for 2 blocks of 3 iterations" in said
    assert f"last_good: {run / 'checkpoints' / 'step_000003'}" in said
    assert checkpoints(run) == ["last_good", "latest", "step_000003", "step_000009"]
    assert checkpoint.last_good(run / "checkpoints") == run / "checkpoints" / "step_000003"
    assert figures(run) == figures(whole)[:9]

    before = (run / "metrics.jsonl").read_bytes()
    again = CliRunner().invoke(app, ["align", str(file), "--json"])
    assert again.exit_code == 3 and (run / "metrics.jsonl").read_bytes() == before
    assert json.loads(again.stdout.splitlines()[-1])["stopped"] == "after iteration 9 by alarm/diversity"

    export, anew, all_the_same = commands(said)
    assert align(*export)[0] == 0 and (run / "last_good_model" / "model_index.json").is_file()
    assert align(*anew, "iterations=1")[0] == 0
    assert figures(tmp_path / "runs" / "collapsing-2")[0]["collapse/diversity"] > 0.05
    code, _ = align("evaluate", checkpoint.last_good(run / "checkpoints"), "--num-samples", 8, "--num-steps", 2)
    assert code == 0
    assert align(*all_the_same)[0] == 0
    assert figures(run) == figures(whole)


def commands(said: str) -> list[list[str]]:
    """Arguments of the commands that the end of a stopped run names."""
    return [shlex.split(line)[1:] for line in said.splitlines() if line.startswith("  flowalign ")]


def test_an_interrupted_run_has_the_alarms_of_the_uninterrupted_one(
    tmp_path: Path, tiny_pipeline_dir: Path, whole: Path
) -> None:
    for iterations in (4, 9, 12):
        loaded = load_align(
            write_run(tmp_path, tiny_pipeline_dir, "collapsing", safety={"window": 3}, iterations=iterations)
        )
        run = drive(loaded.config, loaded.base_dir, Console(quiet=True))
    assert figures(run) == figures(whole) and figures(run)[-1]["alarm/diversity"] == 1
    assert checkpoints(run) == checkpoints(whole) == ["last_good", "latest", "step_000003", "step_000012"]


def test_a_report_tells_of_the_collapse(whole: Path) -> None:
    config = load_align(whole.parents[1] / "collapsing.yaml").config
    page = write_report(whole, config, {}).read_text()
    assert "The policy may be collapsing" in page and "<b>diversity</b>: the images of a group differ by" in page
    assert "First said after iteration 6, of 3 blocks of iterations in all." in " ".join(page.split())


def test_a_run_that_collapses_before_its_first_checkpoint_has_no_last_good_one(
    tmp_path: Path, tiny_pipeline_dir: Path
) -> None:
    file = write_run(tmp_path, tiny_pipeline_dir, "late", checkpoint={"every": 12})
    code, said = align("align", file)
    assert code == 3 and "last_good: none; the alarm is older than every checkpoint" in said
    assert checkpoints(tmp_path / "runs" / "late") == ["latest", "step_000009"] and len(commands(said)) == 1


def test_a_healthy_run_rings_nothing_and_ends_as_ever(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    learner = {"engine": "torch", "micro_batch_size": 8, "optimizer": {"learning_rate": 1e-4}}
    file = write_run(tmp_path, tiny_pipeline_dir, "healthy", learner=learner)
    code, said = align("align", file)
    run = tmp_path / "runs" / "healthy"
    assert code == 0 and "warning" not in said and "stopped" not in said
    alarms = {key: value for row in figures(run) for key, value in row.items() if key.startswith("alarm/") and value}
    assert alarms == {} and checkpoint.last_good(run / "checkpoints") == run / "checkpoints" / "step_000012"
    assert "may be collapsing" not in (run / "report.html").read_text()


def test_the_thresholds_may_change_in_a_begun_run_and_what_measures_may_not(
    tmp_path: Path, tiny_pipeline_dir: Path
) -> None:
    file = write_run(tmp_path, tiny_pipeline_dir, "begun")
    run = begin_run(load_align(file).config)
    CheckpointWriter(run / "checkpoints").save(1, model={"w": torch.zeros(1)}, state={})
    begin_run(load_align(file, ["safety.min_diversity=0.1", "safety.stop=false"]).config)
    with pytest.raises(ConfigError, match=r"safety\.clip"):
        begin_run(load_align(file, ["safety.clip=shapes:open_clip"]).config)


def test_a_clip_directory_that_is_none_is_refused_before_anything_starts(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert load_align(config, ["safety.clip=shapes:open_clip"]).config.safety.clip == str(SHIPPED / "open_clip")
    with pytest.raises(ConfigError, match=r"safety\.clip: .* holds no open_clip_config\.json"):
        load_align(config, [f"safety.clip={tmp_path}"])
