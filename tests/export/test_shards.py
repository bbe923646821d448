"""Pipelines whose weights lie in several files: written by `export`, read by diffusers and by everything of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.export import export
from flowalign.intake.file import load_align
from flowalign.intake.resolved import write_resolved
from flowalign.models.build import load_network
from flowalign.models.fingerprint import encoder_hash
from flowalign.record.contents import base_hash
from tests.families.public import public_pipeline
from tests.families.tiny import tiny_pipeline
from tests.tiny import run_config, write_checkpoint, write_config

LIMIT = 100_000


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained network with a further input, exported whole and in files of 100 KB by the command itself."""
    folder = tmp_path_factory.mktemp("shards")
    base = tiny_pipeline("sd3", folder / "base")
    config = run_config(base, model={"path": str(base), "max_sequence_length": 16, "inputs": ["guidance"]})
    plain = run_config(base, model={"path": str(base), "max_sequence_length": 16})
    for name, own in (("inputs", config), ("plain", plain)):
        write_checkpoint(folder / name, own)
    for name in ("plain", "inputs"):
        own = config if name == "inputs" else plain
        export(folder / name, folder / f"{name}-whole", config=own)
        if name == "inputs":
            export(folder / name, folder / "inputs-shards", config=own, shard_size="100KB")
    write_resolved(plain, folder / "plain")
    command = ["export", str(folder / "plain"), "--to", str(folder / "plain-shards"), "--shard-size", "100kb"]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    return {path.name: path for path in folder.iterdir() if "-" in path.name}


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in module.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_no_file_is_larger_than_asked_but_for_a_single_tensor(exports: dict[str, Path]) -> None:
    for part in ("transformer", "vae", "text_encoder_2"):
        files = sorted((exports["plain-shards"] / part).glob("*.safetensors"))
        indices = list((exports["plain-shards"] / part).glob("*.safetensors.index.json"))
        total = sum(file.stat().st_size for file in files)
        assert (len(files) > 1) == (total > LIMIT + 50_000) and len(indices) == (len(files) > 1), part
        for file in files:
            with safe_open(file, "pt") as opened:
                sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]
            assert sum(sizes) <= LIMIT or len(sizes) == 1
    assert len(list((exports["plain-shards"] / "transformer").glob("*.safetensors"))) > 3
    assert not list(exports["plain-whole"].glob("*/*.index.json"))


def test_diffusers_and_our_loader_read_the_same_weights(exports: dict[str, Path]) -> None:
    pipelines = [public_pipeline(exports[f"plain-{kind}"]) for kind in ("whole", "shards")]
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert equal(*(weights(getattr(pipeline, part)) for pipeline in pipelines))
    own = load_network(ModelConfig(path=str(exports["plain-shards"]))).module
    assert equal(weights(own), weights(pipelines[0].transformer))


def test_further_inputs_are_restored_from_several_files(exports: dict[str, Path]) -> None:
    whole, shards = (load_network(ModelConfig(path=str(exports[f"inputs-{k}"]))) for k in ("whole", "shards"))
    assert shards.inputs == ("guidance",) and equal(weights(whole.module), weights(shards.module))
    assert any(name.startswith("time_text_embed.inputs.guidance") for name in weights(shards.module))


def test_encoders_are_the_same_whatever_files_they_lie_in(exports: dict[str, Path]) -> None:
    whole, shards = (ModelConfig(path=str(exports[f"plain-{kind}"])) for kind in ("whole", "shards"))
    assert encoder_hash(whole) == encoder_hash(shards)
    assert base_hash(exports["plain-shards"]) != base_hash(exports["plain-whole"])


def test_a_run_begins_from_such_an_export_and_names_a_missing_file(exports: dict[str, Path], tmp_path: Path) -> None:
    path, model = write_config(tmp_path), exports["plain-shards"]
    assert load_align(path, [f"model.path={model}"]).config.model.path == str(model)
    index = json.loads(next((model / "transformer").glob("*.index.json")).read_text())
    gone = model / "transformer" / sorted(index["weight_map"].values())[-1]
    kept = gone.rename(model / "kept")
    try:
        with pytest.raises(ConfigError, match=rf"model\.path: .*{gone.name} is not there, which .*index\.json names"):
            load_align(path, [f"model.path={model}"])
    finally:
        kept.rename(gone)


def test_the_command_takes_a_size(exports: dict[str, Path], tmp_path: Path) -> None:
    run = exports["plain-whole"].parent / "plain"
    for text in ("5", "0GB", "five GB", "5TB"):
        done = CliRunner().invoke(app, ["export", str(run), "--to", str(tmp_path / "x"), "--shard-size", text])
        assert done.exit_code == 2 and "such as 5GB" in " ".join(done.output.replace("│", " ").split())
