"""The picture of a plain diffusers script, drawn again by ``flowalign sample`` with what its own note names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.config.section import ConfigError
from flowalign.config.sections import ModelConfig
from flowalign.models.directory import open_directory
from flowalign.models.packing import packed
from flowalign.models.unasked import unasked
from flowalign.samples.noisefile import read_noise

OWN = {
    "sd3": {"num_steps": 28, "guidance_scale": 7.0, "max_sequence_length": 256},
    "flux-dev": {"num_steps": 28, "guidance_scale": 3.5, "max_sequence_length": 512},
    "flux-schnell": {"num_steps": 28, "guidance_scale": 1.0, "max_sequence_length": 512},
    "qwen_image": {"num_steps": 50, "guidance_scale": 1.0, "max_sequence_length": 512},
    "z_image": {"num_steps": 50, "guidance_scale": 6.0, "max_sequence_length": 512},
    "chroma": {"num_steps": 35, "guidance_scale": 5.0, "max_sequence_length": 512},
}


def sample(*words: str | Path) -> str:
    done = CliRunner().invoke(app, ["sample", *map(str, words)], env={"COLUMNS": "1000"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_what_the_note_names_draws_the_picture_of_a_script_with_a_seed_and_nothing_else(
    public: Callable[..., Any], tiny: Callable[..., Path], name: str, tmp_path: Path
) -> None:
    asked = (tiny(name), "--prompt", "a red cube", "--size", "64x96", "--batch", "1")
    first = sample(*asked, "--num-steps", "1", "--out", tmp_path / "first")
    told = sample(*asked, "--out", tmp_path / "told")
    (named,) = re.findall(r"told nothing draws as with (.*)", told)
    assert "--num-steps 28" in named and "--num-steps" not in first.partition("draws as")[2]

    noise = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(5))
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    out = tmp_path / "again"
    said = sample(*asked, *shlex.split(named), "--latents", tmp_path / "noise.safetensors", "--out", out)
    assert "told nothing" not in said and "noise of " in said and "seed" not in said
    pipeline = public(name)
    theirs = pipeline("a red cube", height=64, width=96, generator=torch.Generator().manual_seed(5)).images[0]
    ours = Image.open(out / "0000.png")
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


def test_what_a_call_takes_unasked_is_known_of_each_family(tiny: Callable[..., Path]) -> None:
    for name, own in OWN.items():
        model = ModelConfig(path=str(tiny(name)))
        assert unasked(open_directory(model), model) == own, name
    led = ModelConfig(path=str(tiny("qwen_image")), negative_prompt=" ")
    assert unasked(open_directory(led), led)["guidance_scale"] == 4.0


def test_noise_may_be_packed_as_the_pipeline_takes_it(tiny: Callable[..., Path], tmp_path: Path) -> None:
    noise, file = torch.randn(2, 16, 8, 12), tmp_path / "noise.safetensors"
    save_file({"noise": packed(noise, 2).contiguous()}, file)
    flux, sd3 = (open_directory(ModelConfig(path=str(tiny(name)))) for name in ("flux-dev", "sd3"))
    assert torch.equal(read_noise(file, 2, (64, 96), flux), noise)
    with pytest.raises(ConfigError, match=r"shape \(2, 24, 64\), and the noise of these images of \(2, 16, 8, 12\)$"):
        read_noise(file, 2, (64, 96), sd3)


def test_noise_of_other_images_names_their_number_and_size(tiny: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "noise.safetensors"
    save_file({"noise": torch.zeros(2, 16, 8, 12)}, file)
    directory = open_directory(ModelConfig(path=str(tiny("sd3"))))
    with pytest.raises(ConfigError, match=r"; it is of 2 images and of --size 64x96$"):
        read_noise(file, 1, (128, 128), directory)
    with pytest.raises(ConfigError, match=r"; it is of --size 64x96$"):
        read_noise(file, 2, (64, 64), directory)
