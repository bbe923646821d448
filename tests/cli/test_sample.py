"""``flowalign sample`` on the shipped pipeline: people's own prompts, noise and keys, and the picture of diffusers."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.config.sections import SHIPPED

PAGE = Path(__file__).parents[2] / "docs" / "sampling.md"
FEW = ("--num-steps", "2", "--batch", "3")


def sample(*words: str | Path, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["sample", "shapes", *map(str, words)], env={"COLUMNS": "1000"})
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts of a file, the second with a negative prompt of its own, and one of the command line; latents too."""
    folder = tmp_path_factory.mktemp("drawn")
    rows = [{"prompt": "a photo of a red circle", "tag": "colors", "file": "of-somebody-else.png"}]
    rows += [{"prompt": "a photo of a star", "negative_prompt": "blue"}]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("--prompt", "a dog", "--prompts", folder / "mine.jsonl", "--guidance-scale", "2", "--seed", "3")
    sample(*asked, *FEW, "--save-latents", "--out", folder / "out")
    return folder


def test_prompts_of_a_file_are_drawn_and_its_rows_stay_beside_the_pictures(drawn: Path) -> None:
    index = json.loads((drawn / "out" / "index.json").read_text())
    assert [row["prompt"] for row in index] == ["a dog", "a photo of a red circle", "a photo of a star"]
    assert [row["file"] for row in index] == ["0000.png", "0001.png", "0002.png"]
    assert index[1]["metadata"] == {"tag": "colors"} and index[2]["negative_prompt"] == "blue"
    judged = CliRunner().invoke(app, ["try-reward", "jpeg", "--images", str(drawn / "out"), "--json"])
    assert json.loads(judged.stdout)["prompts"] == [row["prompt"] for row in index]


def test_the_noise_of_a_file_makes_the_same_picture_whatever_the_seed(drawn: Path, tmp_path: Path) -> None:
    asked = ("--prompt", "a dog", "--prompts", drawn / "mine.jsonl", "--guidance-scale", "2", "--seed", "4", *FEW)
    latents = drawn / "out" / "latents.safetensors"
    sample(*asked, "--latents", latents, "--save-latents", "--out", tmp_path / "again")
    sample(*asked, "--out", tmp_path / "other")
    before, again = load_file(latents), load_file(tmp_path / "again" / "latents.safetensors")
    assert torch.equal(before["noise"], again["noise"]) and torch.equal(before["latents"], again["latents"])
    for one, two, other in zip(*map(pictures, (drawn / "out", tmp_path / "again", tmp_path / "other")), strict=True):
        assert np.array_equal(one, two) and not np.array_equal(one, other)
    assert json.loads((tmp_path / "again" / "index.json").read_text())[0]["noise"] == str(latents)


def test_the_page_draws_the_picture_of_a_diffusers_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SHIPPED / "pipeline", tmp_path / "model")
    text = PAGE.read_text().partition("## The picture of a diffusers script")[2]
    script, command = (re.search(rf"```{kind}\n(.*?)```", text, re.S)[1] for kind in ("python", "bash"))  # type: ignore[index]
    exec(compile(script, str(PAGE), "exec"), {})
    program, *asked = shlex.split(command.replace("\\\n", " "))
    assert program == "flowalign"
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    ours, theirs = pictures(tmp_path / "ours"), pictures(tmp_path / "theirs")
    assert len(ours) == len(theirs) == 2
    for one, two in zip(ours, theirs, strict=True):
        assert np.array_equal(one, two)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("learner.epochs=2",), "learner.epochs: has no effect on samples; keys that have one are model"),
        (("model.path=/nowhere",), "model.path: is what the weights were made for"),
        (("evaluation.num_step=3",), "evaluation.num_step: unknown key; did you mean"),
        (("--dtype", "half"), "model.dtype: got 'half'"),
        (("--device", "tpu"), "--device: got 'tpu'; write cpu, cuda"),
        (("--cache", "nothing.json"), "nothing.json"),
        (("--latents", "nothing.safetensors"), "--latents: nothing.safetensors cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_drawn(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in sample("--prompt", "a dog", "--out", tmp_path / "out", *words, code=2)
    assert not (tmp_path / "out").exists()


def test_noise_of_other_images_is_refused_with_both_shapes(tmp_path: Path) -> None:
    save_file({"noise": torch.zeros(1, 16, 8, 8)}, tmp_path / "noise.safetensors")
    refused = sample("--prompt", "a", "--num-images", "2", "--latents", tmp_path / "noise.safetensors", code=2)
    assert "is of shape (1, 16, 8, 8), and the noise of these images of (2, 16, 8, 8)" in refused


def test_a_prompt_is_needed(tmp_path: Path) -> None:
    assert "--prompt: is missing" in sample("--out", tmp_path / "out", code=2)


def test_keys_of_the_configuration_are_what_is_drawn_with(tmp_path: Path) -> None:
    asked = ("--prompt", "a dog", "--batch", "1", "--dtype", "bfloat16", "--out", tmp_path / "out")
    assert "3 steps of heun" in sample("evaluation.num_steps=3", "evaluation.solver=heun", *asked)
