"""A base model that has changed since a run was made: what is opened of the run is never half another model."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.record.hashing import sha256
from flowalign.run.made.base import changed_base

POSITIONS = "pos_embed.pos_embed"  # a buffer of the transformer, which no checkpoint has
PROMPT = ("--prompt", "a photo of a star", "--num-images", "1", "--num-steps", "2")


@pytest.fixture
def base(tmp_path: Path, tiny_pipeline_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_pipeline_dir, tmp_path / "base"))


def flowalign(*arguments: object) -> tuple[int, str]:
    shown = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert shown.exception is None or isinstance(shown.exception, SystemExit), shown.exception
    return shown.exit_code, " ".join((shown.output + shown.stderr).split())


def trained(tmp_path: Path, base: Path, **model: Any) -> Path:
    """A run of one iteration."""
    config = {
        "name": "run",
        "runs_dir": str(tmp_path / "runs"),
        "iterations": 1,
        "model": {"path": str(base), "max_sequence_length": 16, **model},
        "data": {"groups_per_iteration": 2},
        "algorithm": {"type": "flow_grpo", "group_size": 2, "num_steps": 3},
        "rewards": ["jpeg"],
        "rollout": {"chunk_size": 4},
        "learner": {"engine": "torch", "micro_batch_size": 4, "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0}},
        "cluster": {"backend": "local", "threads": 1},
        "evaluation": {"every": 0},
        "checkpoint": {"every": 1},
        "logging": {"wandb": "disabled"},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    code, said = flowalign("align", file)
    assert code == 0, said
    return tmp_path / "runs" / "run"


def retrain(file: Path, which: str = "") -> None:
    """Other weights of the same size, as after another training; or other values of ``which`` alone."""
    tensors = load_file(file)
    other = {which} if which else {*tensors} - {POSITIONS}
    save_file({n: value + 0.01 if n in other else value for n, value in tensors.items()}, file, {"format": "pt"})


@pytest.mark.parametrize("model", [{}, {"lora": {"rank": 2}}], ids=["full", "lora"])
def test_another_text_encoder_than_a_run_was_trained_with_is_refused_by_whatever_opens_it(
    tmp_path: Path, base: Path, model: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    run = trained(tmp_path, base, **model)
    as_it_was = shutil.copytree(base, tmp_path / "as it was")
    retrain(base / "text_encoder" / "model.safetensors")
    for command in (
        ("sample", run, *PROMPT, "--out", tmp_path / "images"),
        ("export", run, "--to", tmp_path / "export", "--as", "lora" if model else "pipeline"),
        ("evaluate", run, "--num-samples", 2),
    ):
        code, said = flowalign(*command)
        assert code == 2
        assert f"model.path: {base}/text_encoder/model.safetensors has changed since step_000001 was written" in said
        assert "--model DIR" in said
    assert not (tmp_path / "images").exists() and not (tmp_path / "export").exists()
    code, said = flowalign("sample", run, *PROMPT, "--out", tmp_path / "images", "--model", as_it_was)
    assert code == 0, said
    with caplog.at_level(logging.WARNING):
        code, said = flowalign("sample", run, *PROMPT, "--out", tmp_path / "others", "--model", base)
    assert code == 0, said
    assert "text_encoder/model.safetensors has changed" in said + caplog.text


UNREAD = {
    "transformer/notes.txt": "mine",
    "transformer/.DS_Store": "",
    "text_encoder/model.fp16.safetensors": "a variant",
    "text_encoder/flax_model.msgpack": "of another library",
    "text_encoder/pytorch_model.bin": "a pickle beside safetensors",
    "vae/samples/picture.png": "",
    "tokenizer/README.md": "",
}


def lay(base: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)


@pytest.mark.parametrize("model", [{}, {"lora": {"rank": 2}}], ids=["full", "lora"])
def test_files_that_nothing_reads_may_come_and_go(tmp_path: Path, base: Path, model: dict[str, Any]) -> None:
    lay(base, {"vae/old.txt": "a note"})
    run = trained(tmp_path, base, **model)
    (base / "vae" / "old.txt").unlink()
    lay(base, UNREAD)
    for command in (
        ("sample", run, *PROMPT, "--out", tmp_path / "images"),
        ("export", run, "--to", tmp_path / "export", "--as", "lora" if model else "pipeline"),
        ("evaluate", run, "--num-samples", 2),
        ("align", tmp_path / "run.yaml", "iterations=2"),
    ):
        code, said = flowalign(*command)
        assert code == 0, said
        assert "is new" not in said and "is gone" not in said


def recorded(base: Path, files: Iterable[Path]) -> dict[str, str]:
    return {path.relative_to(base).as_posix(): sha256(path) for path in files}


def of_an_earlier_version(base: Path) -> dict[str, dict[str, str]]:
    """What checkpoints of earlier versions have of a base: all files of the folders, of very many one hash for all."""
    files = recorded(base, (path for path in base.rglob("*") if path.is_file() and path.name[0] != "."))
    if len(files) > 1000:
        lines = "".join(f"{name}\0{files[name]}\n" for name in sorted(files))
        files = {"*": hashlib.sha256(lines.encode()).hexdigest()}
    return {"model.path": files}


def test_a_record_of_an_earlier_version_is_compared_by_what_is_read(base: Path) -> None:
    lay(base, {"vae/old.txt": "a note", "text_encoder/model.fp16.safetensors": "a variant"})
    state = {"made_of": of_an_earlier_version(base)}
    assert changed_base(state, base, weights_too=True) is None
    for name in ("vae/old.txt", "text_encoder/model.fp16.safetensors"):
        (base / name).unlink()
    lay(base, {"transformer/notes.txt": "mine"})
    assert changed_base(state, base, weights_too=True) is None
    (base / "vae" / "config.json").unlink()
    assert changed_base(state, base, weights_too=True) == "vae/config.json is gone"


def test_a_record_of_an_earlier_version_of_very_many_files_holds_with_what_is_not_read(base: Path) -> None:
    lay(base, {f"vae/{number}.txt": str(number) for number in range(1000)})
    state = {"made_of": of_an_earlier_version(base)}
    assert [*state["made_of"]["model.path"]] == ["*"]
    assert changed_base(state, base, weights_too=True) is None
    (base / "vae" / "7.txt").write_text("another")  # nobody can tell which file it was
    said = changed_base(state, base, weights_too=True)
    assert said is not None and "has changed, been added or gone" in said


def test_a_base_of_very_many_files_is_compared_as_it_is_recorded(tmp_path: Path, base: Path) -> None:
    """Of more than a thousand files a run keeps one hash for all; those that are not read are not among them."""
    for number in range(1000):
        lay(base, {f"vae/{number}.json": str(number), f"vae/{number}.txt": ""})
    run = trained(tmp_path, base)
    (base / "vae" / "7.txt").write_text("another")
    code, said = flowalign("sample", run, *PROMPT, "--out", tmp_path / "images")
    assert code == 0, said
    (base / "vae" / "7.json").write_text("another")
    code, said = flowalign("sample", run, *PROMPT, "--out", tmp_path / "others")
    assert code == 2 and "has changed, been added or gone" in said


def test_a_configuration_given_beside_a_run_does_not_excuse_its_base(tmp_path: Path, base: Path) -> None:
    run = trained(tmp_path, base)
    retrain(base / "text_encoder" / "model.safetensors")
    code, said = flowalign("sample", run, *PROMPT, "--out", tmp_path / "images", "--config", run / "config.yaml")
    assert code == 2 and "has changed since step_000001 was written" in said


def test_a_checkpoint_of_all_weights_brings_its_own(tmp_path: Path, base: Path) -> None:
    run = trained(tmp_path, base)
    retrain(base / "transformer" / "diffusion_pytorch_model.safetensors")
    code, said = flowalign("sample", run, *PROMPT, "--out", tmp_path / "images")
    assert code == 0, said


def test_a_base_with_other_buffers_is_refused_though_a_checkpoint_brings_its_own_weights(
    tmp_path: Path, base: Path
) -> None:
    run = trained(tmp_path, base)
    as_it_was = shutil.copytree(base, tmp_path / "as it was")
    retrain(base / "transformer" / "diffusion_pytorch_model.safetensors", POSITIONS)
    for command in (
        ("sample", run, *PROMPT, "--out", tmp_path / "images"),
        ("export", run, "--to", tmp_path / "export", "--as", "pipeline"),
        ("evaluate", run, "--num-samples", 2),
    ):
        code, said = flowalign(*command)
        assert code == 2 and f"another base model than {base}, whose network has other buffers" in said
    code, said = flowalign("sample", run, *PROMPT, "--out", tmp_path / "images", "--model", as_it_was)
    assert code == 0, said
