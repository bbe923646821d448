"""What tells a model's encoders and weights apart is what is loaded of its directory, not what lies beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from flowalign.config.sections import ModelConfig
from flowalign.models.build import load_encoders
from flowalign.models.fingerprint import encoder_hash, encoders_of, kept_text_hash, text_hash
from flowalign.models.weights import loaded_files, read_weights
from flowalign.samples.arrange import with_negatives
from flowalign.samples.texts import texts_of
from flowalign.types import PromptBatch

LENGTH = 32
Build = Callable[..., Path]
Hashes = Callable[[ModelConfig], list[str]]


@pytest.fixture
def hashes(tmp_path: Path) -> Hashes:
    def of(model: ModelConfig) -> list[str]:
        rounded = encoders_of(model)("float32")
        return [text_hash(model), kept_text_hash(model, tmp_path / "store"), encoder_hash(model), rounded]

    return of


def config_of(path: Path) -> ModelConfig:
    return ModelConfig(path=str(path), max_sequence_length=LENGTH)


def tokens(path: Path) -> torch.Tensor:
    return load_encoders(config_of(path)).encode_prompts(["a red cube"], LENGTH).text["tokens"]


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def assert_others(before: list[str], after: list[str]) -> None:
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_an_encoder_that_the_index_leaves_out_is_none_even_if_its_folder_is_there(
    tiny: Build, tmp_path: Path, hashes: Hashes
) -> None:
    path = shutil.copytree(tiny("sd3", t5=True), tmp_path / "model")
    model, with_t5 = config_of(path), tokens(path)
    before = hashes(model)
    edit(path / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    assert float((tokens(path) - with_t5).abs().max()) > 1
    assert_others(before, hashes(model))
    left_out = hashes(model)
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(path / part)
    assert hashes(model) == left_out


@pytest.mark.parametrize("beside", ["variant", "other shards"])
def test_files_that_are_not_loaded_hide_none_that_are(tiny: Build, tmp_path: Path, hashes: Hashes, beside: str) -> None:
    path = shutil.copytree(tiny("sd3", t5=True), tmp_path / "model")
    part, model = path / "text_encoder_3", config_of(path)
    alone, encoder = hashes(model), T5EncoderModel.from_pretrained(str(part))
    (part / "model.safetensors").unlink()
    encoder.save_pretrained(str(part), max_shard_size="40KB")
    if beside == "variant":
        encoder.half().save_pretrained(str(part), variant="fp16", max_shard_size="60KB")
    else:
        shutil.copy(next(part.glob("model-00001-*")), part / "model-00001-of-00999.safetensors")
    assert hashes(model) == alone and read_weights(part).files == tuple(loaded_files(part))
    before = tokens(path)
    first = loaded_files(part)[0]  # which the other file has all tensors of
    save_file({name: 1.5 * value for name, value in load_file(first).items()}, first, {"format": "pt"})
    assert not torch.equal(tokens(path), before)
    assert_others(alone, hashes(model))


def test_another_chat_template_is_another_encoder_wherever_it_is_saved(
    tiny: Build, tmp_path: Path, hashes: Hashes
) -> None:
    path = shutil.copytree(tiny("z_image"), tmp_path / "model")
    model, file = config_of(path), path / "tokenizer" / "chat_template.jinja"
    before, template = hashes(model), file.read_text()
    file.write_text(template.replace("<|im_start|>assistant", "<|im_start|>a photo"))
    assert_others(before, hashes(model))
    file.unlink()
    edit(path / "tokenizer" / "tokenizer_config.json", chat_template=template)
    assert hashes(model)[2:] == before[2:]


def test_a_null_in_a_row_names_no_negative_prompt(tiny: Build) -> None:
    """A table that has the column for some rows writes null into the others."""
    rows = ({"prompt": "a cube", "negative_prompt": None}, {"prompt": "a ball", "negative_prompt": "bad text"})
    batch = PromptBatch(tuple(row["prompt"] or "" for row in rows), (0, 1), (0, 1), rows)
    model = config_of(tiny("qwen_image")).model_copy(update={"negative_prompt": "blurry"})
    assert with_negatives(batch, model).negatives == ("blurry", "bad text")
    assert "blurry" in texts_of(rows, model)
    none = model.model_copy(update={"negative_prompt": None})
    assert with_negatives(batch, none).negatives == ("", "bad text")
