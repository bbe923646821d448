"""A run directory and its model at another place: trained on bit for bit, exported, sampled, evaluated, reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from flowalign.cli import app
from flowalign.config.section import ConfigError
from flowalign.intake.file import load_align
from flowalign.intake.recorded import config_of
from flowalign.intake.resolved import read_resolved, write_resolved
from flowalign.intake.run_directory import check_run
from flowalign.record import checkpoint
from flowalign.record.contents import digest_of, located, same
from flowalign.record.metrics import read_metrics, without_times
from tests.tiny import run_config, write_checkpoint

REWARD = "def reward(images, prompts, metadata):\n    return images.reshape(len(images), -1).mean(1) / 255.0\n"
ROWS = [
    {"tag": "single_object", "prompt": f"a photo of a {name}", "include": [{"class": name, "count": 1}]}
    for name in ("circle", "star")
]
CONFIG = {
    "iterations": 2,
    "model": {"path": "../models/base", "max_sequence_length": 16, "lora": {"rank": 2, "alpha": 4}},
    "data": {"prompts": "prompts.jsonl", "groups_per_iteration": 2},
    "algorithm": {"type": "flow_grpo", "group_size": 2, "num_steps": 3},
    "rewards": [{"spec": "bright.py:reward"}],
    "rollout": {"chunk_size": 4},
    "learner": {"engine": "torch", "micro_batch_size": 4, "optimizer": {"learning_rate": 1e-3}},
    "cluster": {"backend": "local", "threads": 1},
    "evaluation": {"every": 0, "prompts": "prompts.jsonl", "num_samples": 2, "num_steps": 2},
    "checkpoint": {"every": 1},
    "logging": {"wandb": "disabled"},
}


def project(folder: Path, pipeline: Path) -> Path:
    """A project as people have them: a configuration, prompts and a reward beside it, a model, runs."""
    shutil.copytree(pipeline, folder / "models" / "base")
    (folder / "work" / "runs").mkdir(parents=True)
    (folder / "work" / "bright.py").write_text(REWARD)
    (folder / "work" / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name in ("whole", "moved"):
        (folder / "work" / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, **CONFIG}))
    return folder / "work"


def flowalign(*arguments: object) -> Result:
    shown = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert shown.exception is None or isinstance(shown.exception, SystemExit), shown.exception
    return shown


def done(*arguments: object) -> str:
    shown = flowalign(*arguments)
    assert shown.exit_code == 0, shown.output + shown.stderr
    return shown.output


def refused(*arguments: object) -> str:
    shown = flowalign(*arguments)
    assert shown.exit_code == 2, shown.output
    return " ".join(shown.stderr.split())


def assert_same_run(one: Path, other: Path) -> None:
    a, b = (checkpoint.load(run / "checkpoints" / "step_000002") for run in (one, other))
    for left, right in ((a.model, b.model), (a.optimizer_of(0)[0], b.optimizer_of(0)[0])):
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    rows = [[without_times(row) for row in read_metrics(run / "metrics.jsonl")] for run in (one, other)]
    assert rows[0] == rows[1] and len(rows[0]) == 2


def test_a_run_moved_with_its_model_is_trained_on_bit_for_bit_exported_sampled_evaluated_and_reported(
    tmp_path: Path, tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old", tmp_path / "another disk" / "new"
    work = project(old, tiny_pipeline_dir)
    monkeypatch.chdir(work)
    done("align", "whole.yaml")
    done("align", "moved.yaml", "iterations=1")
    new.parent.mkdir()
    shutil.copytree(old, new)
    old.rename(tmp_path / "out of sight")
    whole, run = tmp_path / "out of sight" / "work" / "runs" / "whole", new / "work" / "runs" / "moved"
    copy = new / "copied" / "elsewhere"
    shutil.copytree(run, copy)

    monkeypatch.chdir(tmp_path)
    done("align", run / "config.yaml", "iterations=2")  # its own configuration, from another working directory
    assert_same_run(whole, run)
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["model"]["path"] == str(new / "models" / "base") and written["run_dir"] == str(run)

    out = tmp_path / "out"
    done("export", run, "--to", out / "lora", "--as", "lora")
    done("export", run / "checkpoints" / "step_000001", "--to", out / "pipeline")
    done("sample", run, "--prompt", "a photo of a red circle", "--num-steps", 1, "--out", out / "images")
    done("evaluate", run, "--out", out / "evaluation")
    done("report", run)
    assert (out / "lora" / "pytorch_lora_weights.safetensors").is_file() and (out / "images" / "0000.png").is_file()

    # The run alone moved once more, and its model got another name: the user's file and key say where things are.
    (new / "models" / "base").rename(new / "models" / "renamed")
    monkeypatch.chdir(new / "work")
    place = (f"runs_dir={copy.parent}", f"name={copy.name}")
    assert "model.path" in refused("align", "moved.yaml", *place)
    done("align", "moved.yaml", *place, "model.path=../models/renamed")
    assert_same_run(whole, copy)


@pytest.fixture
def lora_run(tmp_path: Path, tiny_pipeline_dir: Path) -> tuple[Path, Path]:
    """A LoRA run's directory, and where its base model was moved to."""
    base, run = tmp_path / "a" / "base", tmp_path / "b" / "runs" / "r"
    shutil.copytree(tiny_pipeline_dir, base)
    config = run_config(base, lora=True)
    write_checkpoint(run, config)
    write_resolved(config, run)
    return run, base.rename(tmp_path / "a" / "moved")


def changed(base: Path, to: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(base, to)
    change(to)
    return to


def other_weights(pipeline: Path) -> None:
    file = next((pipeline / "transformer").glob("*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)


def test_a_missing_model_is_named_with_its_key_and_the_option_that_says_where_it_is(
    lora_run: tuple[Path, Path],
) -> None:
    run, _ = lora_run
    for source in (run, run / "checkpoints", run / "checkpoints" / "step_000010"):
        said = refused("sample", source, "--prompt", "a", "--out", run.parent / "out")
        assert "error: model.path: " in said and "a/base, which " in said and "--model DIR" in said


def test_model_is_taken_by_every_command_that_needs_one(lora_run: tuple[Path, Path], tmp_path: Path) -> None:
    run, base = lora_run
    assert config_of(run, None, base).model.path == str(base)
    done("sample", run, "--prompt", "a", "--num-steps", 1, "--out", tmp_path / "images", "--model", base)
    done("merge", run, run, "--to", tmp_path / "merged", "--model", base)
    for command in ("evaluate", "export", "make-pairs", "make-preferences", "calibrate-cache"):
        assert "--model" in CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output


def test_another_model_than_a_lora_was_trained_from_is_refused_by_name(lora_run: tuple[Path, Path]) -> None:
    run, base = lora_run
    other = changed(base, base.parent / "other", other_weights)
    with pytest.raises(ConfigError, match=r"--model: .*other is another model than .*step_000010.*fits its own base"):
        config_of(run, None, other)
    with pytest.raises(ConfigError, match=r"--model: .*is not a directory"):
        config_of(run, None, base.parent / "absent")
    with pytest.raises(ConfigError, match=r"--model: .* is a run or a checkpoint"):
        config_of(run, None, run)
    with pytest.raises(ConfigError, match=r"--model: .* whole pipeline, which needs no other"):
        config_of(base, None, base)


def test_a_full_checkpoint_takes_another_model_of_its_architecture_and_says_so(
    tmp_path: Path, tiny_pipeline_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = run_config(tiny_pipeline_dir)
    write_checkpoint(tmp_path / "r", config)
    write_resolved(config, tmp_path / "r")
    assert config_of(tmp_path / "r", None, tiny_pipeline_dir).model.path == str(tiny_pipeline_dir)
    assert caplog.text == ""
    other = changed(tiny_pipeline_dir, tmp_path / "other", other_weights)
    assert config_of(tmp_path / "r", None, other).model.path == str(other)
    assert "another model" in caplog.text


@pytest.fixture
def begun(tmp_path: Path, tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a run that was begun there, without a step of training."""
    work = project(tmp_path / "p", tiny_pipeline_dir)
    monkeypatch.chdir(work)
    config = load_align(work / "moved.yaml").config
    write_checkpoint(work / "runs" / "moved", config, step=1)
    write_resolved(config, work / "runs" / "moved")
    return work


def forget(config: Path) -> None:
    """As version 0.1 wrote it."""
    written = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({k: v for k, v in written.items() if k not in ("run_dir", "contents")}))


MOVES: dict[str, tuple[str, str]] = {
    "model.path": ("../models/base", "../models/second"),
    "data.prompts": ("prompts.jsonl", "my prompts.jsonl"),
    "rewards.0.spec": ("bright.py", "light.py"),
}


@pytest.mark.parametrize("key", MOVES)
@pytest.mark.parametrize("recorded", [True, False])
def test_a_key_may_lead_to_another_place_with_the_same_content_and_not_with_another(
    begun: Path, key: str, recorded: bool
) -> None:
    before, after = MOVES[key]
    (shutil.copytree if (begun / before).is_dir() else shutil.copy)(begun / before, begun / after)
    if not recorded:
        forget(begun / "runs" / "moved" / "config.yaml")
    suffix = ":reward" if after.endswith(".py") else ""
    changed = [f"{key}={after}{suffix}"]
    check_run(load_align(begun / "moved.yaml", changed).config)
    if key == "model.path":
        other_weights(begun / after)
    else:
        (begun / after).write_text((begun / before).read_text() + "\n\n# another\n" if suffix else json.dumps(ROWS[0]))
    with pytest.raises(ConfigError, match=rf"^{key}: .* was begun with .*and cannot go on with"):
        check_run(load_align(begun / "moved.yaml", changed).config)


def test_a_teacher_that_is_a_run_is_found_again_and_may_be_named_at_its_new_place(
    tmp_path: Path, tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = project(tmp_path / "p", tiny_pipeline_dir)
    monkeypatch.chdir(work)
    taught = {**CONFIG, "name": "taught", "algorithm": {"type": "opd", "teachers": {"t": {"path": "runs/teacher"}}}}
    (work / "taught.yaml").write_text(yaml.safe_dump({**taught, "learner": {"engine": "torch", "micro_batch_size": 2}}))
    write_checkpoint(work / "runs" / "teacher", load_align(work / "moved.yaml").config, step=3)
    config = load_align(work / "taught.yaml").config
    write_checkpoint(work / "runs" / "taught", config, step=1)
    write_resolved(config, work / "runs" / "taught")
    new = (tmp_path / "p").rename(tmp_path / "q") / "work"
    own = load_align(new / "runs" / "taught" / "config.yaml").config
    assert own.algorithm["teachers"]["t"]["path"] == str(new / "runs" / "teacher")
    monkeypatch.chdir(new)
    shutil.move(new / "runs" / "teacher", new / "teachers" / "first")
    elsewhere = "algorithm.teachers.t.path=teachers/first"
    check_run(load_align(new / "taught.yaml", [elsewhere]).config)
    write_checkpoint(new / "teachers" / "first", own, step=4)
    with pytest.raises(ConfigError, match=r"^algorithm.teachers.t.path: .*cannot go on with"):
        check_run(load_align(new / "taught.yaml", [elsewhere]).config)


def test_another_function_of_the_same_file_is_another_reward(begun: Path) -> None:
    (begun / "bright.py").write_text(REWARD + REWARD.replace("reward", "other"))
    with pytest.raises(ConfigError, match=r"^rewards.0.spec: "):
        check_run(load_align(begun / "moved.yaml", ["rewards.0.spec=bright.py:other"]).config)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_project_folder_that_was_renamed_continues_with_the_users_own_file(
    begun: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    if not recorded:
        forget(begun / "runs" / "moved" / "config.yaml")
    new = begun.parent.rename(begun.parent.parent / "renamed") / "work"
    monkeypatch.chdir(new)
    check_run(load_align(new / "moved.yaml").config)
    own = read_resolved(new / "runs" / "moved")
    assert own.model.path == str(new.parent / "models" / "base")
    assert load_align(new / "runs" / "moved" / "config.yaml").config.data.prompts == str(new / "prompts.jsonl")


def test_what_lies_at_the_old_relative_place_is_not_taken_where_it_is_something_else(begun: Path) -> None:
    new = begun.parent.rename(begun.parent.parent / "renamed") / "work"
    (new / "prompts.jsonl").write_text(json.dumps(ROWS[0]))
    own: Any = read_resolved(new / "runs" / "moved")
    assert own.data.prompts == str(begun / "prompts.jsonl")


def test_a_file_that_changed_since_a_run_of_an_older_version_was_begun_is_refused_and_a_folder_said(
    begun: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_run(load_align(begun / "moved.yaml").config)
    assert caplog.text == ""
    (begun / "../models/base/scheduler/notes.json").write_text("{}")
    check_run(load_align(begun / "moved.yaml").config)
    assert "model.path: " in caplog.text and "holds something else than when" in caplog.text
    (begun / "prompts.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(
        ConfigError, match=r"^data.prompts: .* holds something else than when .*--accept-changed data.p"
    ):
        check_run(load_align(begun / "moved.yaml").config)
    check_run(load_align(begun / "moved.yaml").config, ["data.prompts"])


def test_a_copied_runs_own_configuration_means_the_copy_and_an_override_another_run(begun: Path) -> None:
    copy = begun / "elsewhere" / "second"
    shutil.copytree(begun / "runs" / "moved", copy)
    config = load_align(copy / "config.yaml").config
    assert Path(config.runs_dir, config.name) == copy
    assert load_align(copy / "config.yaml", ["name=third"]).config.name == "third"
    original = load_align(begun / "runs" / "moved" / "config.yaml").config
    assert (original.runs_dir, original.name) == ("runs", "moved")


def test_a_digest_tells_what_a_path_holds_and_not_where_or_since_when(tmp_path: Path, tiny_pipeline_dir: Path) -> None:
    pipeline = tmp_path / "copy"
    shutil.copytree(tiny_pipeline_dir, pipeline)
    assert digest_of(pipeline) == digest_of(tiny_pipeline_dir)
    (pipeline / "README.md").write_text("a note")
    (pipeline / ".git").mkdir()
    (pipeline / ".git" / "config").write_text("x")
    assert digest_of(pipeline) == digest_of(tiny_pipeline_dir)
    (pipeline / "scheduler" / "scheduler_config.json").write_text("{}")
    assert digest_of(pipeline) != digest_of(tiny_pipeline_dir)
    large = tmp_path / "large.parquet"
    with large.open("wb") as file:
        file.truncate(100 * 2**20)
    before = digest_of(large)
    with large.open("r+b") as file:
        file.write(b"x")
    assert before is not None and digest_of(large) != before
    assert digest_of(tmp_path / "absent") is None


@pytest.mark.parametrize(
    "value", ["prompts.jsonl", "/", "/tmp", "url:http://h/x", "shapes:train", "", 3, None, "/a\0/b/c"]
)
def test_what_is_no_absolute_path_is_taken_as_it_stands(value: object, tmp_path: Path) -> None:
    assert located(value) is None
    assert not same(value, str(tmp_path), None, tmp_path)
