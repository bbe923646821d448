"""Directories and files of a configuration that are not what they should be end in one sentence with the key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flowalign.config.section import ConfigError
from flowalign.data.banks.latents import LatentsError, load_bank
from flowalign.intake.file import load_align, load_pretrain
from tests.tiny import write_config

CUT = '{"_class_name": "StableDiff'
INDEX, NETWORK, VAE = "model_index.json", "transformer/config.json", "vae/config.json"
SCHEDULER, RECORD = "scheduler/scheduler_config.json", "flowalign.json"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_align(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def without(file: Path, key: str) -> str:
    return json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != key})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (INDEX, CUT, "model_index.json is not JSON (Unterminated string"),
        (INDEX, "[]", "model_index.json holds a list, not a JSON object"),
        (INDEX, "null", "model_index.json holds null"),
        (INDEX, "", "model_index.json is not JSON"),
        (INDEX, "{}".encode("utf-16"), "model_index.json looks like UTF-16 text; save it as UTF-8"),
        (INDEX, '{"_class_name": "é"}'.encode("cp1252"), "model_index.json, line 1 is not UTF-8"),
        (INDEX, b"\x00" * 64, "model_index.json, line 1 holds a NUL byte"),
        (INDEX, "{}", "holds a None, which no family here loads"),
        (NETWORK, CUT, "transformer/config.json is not JSON"),
        (NETWORK, "{}", "transformer/config.json lacks 'patch_size'; give the directory of a whole pipeline"),
        (NETWORK, '{"patch_size": null}', "transformer/config.json holds no number where one is wanted"),
        (NETWORK, '{"patch_size": 2, "sample_size": "x"}', "transformer/config.json holds no number"),
        (NETWORK, '{"patch_size": 2, "sample_size": 8}', "transformer/config.json lacks 'in_channels'"),
        (NETWORK, "[1]", "transformer/config.json holds a list"),
        (VAE, '{"block_out_channels": 4}', "holds no number where one is wanted"),
        (VAE, "{}}", "vae/config.json is not JSON (Extra data"),
        (SCHEDULER, "[]", "scheduler_config.json holds a list"),
        (SCHEDULER, '{"shift": null}', "shift"),
        (SCHEDULER, '{"shift": "x"}', "shift"),
        (SCHEDULER, "{}".encode("utf-16"), "scheduler_config.json looks like UTF-16"),
        (RECORD, CUT, "flowalign.json is not JSON"),
        (RECORD, "[]", "flowalign.json holds a list"),
        (RECORD, b"\xff\xfe{\x00", "flowalign.json looks like UTF-16"),
    ],
)
def test_a_model_whose_files_are_damaged_is_refused_by_the_file(
    config: Path, name: str, content: str | bytes, said: str
) -> None:
    file = config.parent / "model" / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    sentence = refused(config)
    assert sentence.startswith("model.path: ") and said in sentence


@pytest.mark.parametrize("name", [INDEX, NETWORK, VAE])
def test_a_model_that_lacks_a_file_or_has_a_folder_in_its_place_is_refused(config: Path, name: str) -> None:
    file = config.parent / "model" / name
    file.unlink()
    assert refused(config).startswith("model.path: ")
    file.mkdir()
    assert refused(config).startswith("model.path: ")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_text("weights"), "is not a directory"),
        (lambda path: path.mkdir(), "has no model_index.json"),
        (lambda path: path.symlink_to(path), "is not a directory"),
        (lambda path: path.symlink_to("nowhere"), "is not a directory"),
    ],
)
@pytest.mark.parametrize("key", ["model.path", "algorithm.teachers.t.path"])
def test_a_model_that_is_no_directory_is_refused(config: Path, key: str, make: Callable, said: str) -> None:
    make(config.parent / "other")
    overrides = {
        "model.path": ["model.path=other"],
        "algorithm.teachers.t.path": ["algorithm={type: opd, teachers: {t: {path: other}}}"],
    }[key]
    sentence = refused(config, *overrides)
    assert sentence.startswith(f"{key}: ")
    assert said in sentence or "no run" in sentence or "holds no checkpoint" in sentence or "other" in sentence


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "holds a list"),
        (CUT, "is not JSON"),
        ("{}", "'coefficients'"),
        ('{"coefficients": []}', "are no list of numbers"),
        ('{"coefficients": "12"}', "are no list of numbers"),
        ('{"coefficients": [1, NaN]}', "NaN is no number"),
        ('{"coefficients": [1, null]}', "is no calibration"),
        (b"\xff\xfe{\x00}\x00", "looks like UTF-16"),
        (b"\xe9", "is not UTF-8"),
        (None, "cannot be read (Is a directory)"),
    ],
)
def test_a_calibration_that_is_none_is_refused(config: Path, content: str | bytes | None, said: str) -> None:
    file = config.parent / "tea.json"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    sentence = refused(config, "rollout.cache={calibration: tea.json}")
    assert sentence.startswith("rollout.cache.calibration: ") and said in sentence


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_text("id,prompt\n"), ""),
        (lambda path: path.write_bytes(b""), ""),
        (lambda path: path.mkdir(), ""),
        (lambda path: (path.mkdir(), (path / "x.parquet").write_bytes(b"PAR1")), ""),
        (lambda path: None, "does not exist"),
    ],
)
def test_preferences_that_are_none_are_refused(config: Path, make: Callable, said: str) -> None:
    make(config.parent / "pairs")
    dpo = "algorithm={type: diffusion_dpo, source: offline}"
    sentence = refused(config, dpo, "data.preferences=pairs", "rewards=[]")
    assert sentence.startswith("data.preferences: ") and said in sentence


PRETRAIN = """name: base
model: {path: model}
latents: bank
algorithm: {type: rectified_flow}
phases: [{iterations: 5, learning_rate: 1e-3}]
"""


def test_latents_that_are_none_are_refused(config: Path) -> None:
    path, bank = config.parent / "pretrain.yaml", config.parent / "bank"
    path.write_text(PRETRAIN)
    for make in (lambda: bank.write_text("x"), lambda: (bank.unlink(), bank.mkdir()), lambda: shutil.rmtree(bank)):
        make()
        with pytest.raises(ConfigError, match=r"^latents: .*bank holds no latents; make them first"):
            load_pretrain(path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe{\x00}\x00", b'{"format": "\xe9"}', b"null", b"[" * 100_000, b"\x00" * 99]
)
@pytest.mark.parametrize("name", ["manifest.json", "prompts.json"])
def test_a_bank_with_a_damaged_text_file_is_refused_by_the_file(tmp_path: Path, name: str, content: bytes) -> None:
    import torch
    from safetensors.torch import save_file

    if name == "prompts.json":  # of the older layout, which has no hashes
        save_file({"latents": torch.zeros(1, 1, 1, 1), "prompt": torch.zeros(1, dtype=torch.int64)}, tmp_path / "l")
        (tmp_path / "l").rename(tmp_path / "latents.safetensors")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LatentsError, match=name):
        load_bank(tmp_path)
