"""Which files of a pipeline are read when it is loaded, by their names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flowalign.record.contents import base_hash, digest_of, has_digest, relocated, same
from flowalign.record.pipelinefiles import files_read

PIPELINE = {
    "model_index.json",
    "flowalign.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer_3/spiece.model",
    "tokenizer_2/additional_chat_templates/tools.jinja",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


@pytest.mark.parametrize(
    "beside",
    [
        "transformer/notes.txt",
        "transformer/diffusion_pytorch_model.bin",
        "transformer/diffusion_pytorch_model.safetensors.index.fp16.json",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "text_encoder/model.onnx",
        "text_encoder/tf_model.h5",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json.bak",
        "tokenizer/notes.txt",
        "pipeline.py",
        "sheet.png",
    ],
)
def test_what_no_loader_opens_is_not_read(beside: str) -> None:
    assert files_read(PIPELINE) == PIPELINE and files_read({*PIPELINE, beside}) == PIPELINE


@pytest.mark.parametrize(
    "alone",
    [
        {"vae/config.json", "vae/diffusion_pytorch_model.bin"},
        {"text_encoder/config.json", "text_encoder/pytorch_model.bin.index.json"},
        {"vae/diffusion_pytorch_model.fp16.safetensors"},
        {"transformer/model.safetensors", "transformer/model.fp16.safetensors"},  # a base is known by all of them
        {
            "text_encoder/model.safetensors",
            "text_encoder/adapter_model.safetensors",
            "text_encoder/adapter_config.json",
        },
    ],
)
def test_what_may_be_all_there_is_counts(alone: set[str]) -> None:
    assert files_read(alone) == alone


def test_a_pipeline_s_digest_is_of_what_is_read_and_one_of_an_earlier_version_still_holds(
    tmp_path: Path, tiny_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, other = (Path(shutil.copytree(tiny_pipeline_dir, tmp_path / name / "base")) for name in ("a", "b"))
    (base / "vae" / "notes.txt").write_text("mine")
    made = digest_of(base)
    assert made is not None and made == digest_of(other)
    with monkeypatch.context() as earlier:
        earlier.setattr("flowalign.record.contents.files_read", lambda names: names)
        was = digest_of(base)
    assert was is not None and was != made and was.startswith(f"pipeline:{base_hash(base)}:")
    assert has_digest(base, made) and has_digest(base, was) and has_digest(other, made)
    assert not has_digest(other, was)  # nobody can tell that only a note is missing
    (other / "vae" / "notes.txt").write_text("mine")
    assert same(str(base), str(other), was, tmp_path)
    shutil.rmtree(base)
    values = {"model": {"path": str(base)}}
    held = {"model.path": was}
    assert relocated(values, other.parent / "runs" / "r", str(base.parent / "runs" / "r"), held) == {
        "model.path": str(other)
    }
    (other / "vae" / "config.json").write_text("{}")
    assert not has_digest(other, made) and not has_digest(other, was)
