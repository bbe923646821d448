"""The nearest training image of each generated one, in a folder and in a bank, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.config.sections import SHIPPED, ModelConfig
from flowalign.data.banks.latents import LatentBank, Shard, save_bank
from flowalign.data.images import ORIGINAL
from flowalign.making.measuring import true_scenes
from flowalign.measure import memorised
from flowalign.measure.memorised import nearest
from flowalign.models.build import load_encoders
from flowalign.models.fingerprint import encoder_hash

ANGLES = "import numpy as np\ndef mean(images):\n    return images.reshape(len(images), -1, 3).mean(1)\n"


def on_circle(*degrees: float) -> np.ndarray:
    return np.stack([(np.cos(np.radians(a)), np.sin(np.radians(a))) for a in degrees]).astype(np.float32)


def test_the_nearest_is_the_smallest_angle_and_authentic_is_what_another_training_image_is_as_near_to() -> None:
    # Training at 0, 10, 90; its own nearest: 10 away, 10 away, 80 away.
    found = nearest(3 * on_circle(2, 350, 60, 95), on_circle(0, 10, 90))
    assert found.place_N.tolist() == [0, 0, 2, 2]
    np.testing.assert_allclose(found.cosine_N, np.cos(np.radians([2, 10, 30, 5])), atol=1e-6)
    np.testing.assert_allclose(found.other_N, np.cos(np.radians([10, 10, 80, 80])), atol=1e-6)
    assert found.authentic_N.tolist()[0] is False and found.authentic_N.tolist()[2:] == [False, False]
    far = nearest(on_circle(130), on_circle(0, 10, 90, 92))
    assert far.place_N.tolist() == [3] and far.authentic_N.tolist() == [True]  # 38 away, its neighbour 2


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = np.random.default_rng(0)
    one, many = drawn.normal(size=(37, 8)).astype(np.float32), drawn.normal(size=(53, 8)).astype(np.float32)
    whole = nearest(one, many)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (one.astype(float), many.astype(float))]
    assert whole.place_N.tolist() == (unit[0] @ unit[1].T).argmax(1).tolist()
    own = unit[1] @ unit[1].T - 9 * np.eye(53)
    np.testing.assert_allclose(whole.other_N, own.max(1)[whole.place_N], atol=1e-6)
    monkeypatch.setattr(memorised, "BLOCK", 7)
    parts = nearest(one, many)
    assert parts.place_N.tolist() == whole.place_N.tolist()
    np.testing.assert_allclose(parts.other_N, whole.other_N, atol=1e-6)


def save(images: np.ndarray, folder: Path) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:04d}.png")
    return folder


def measured(*arguments: str | Path) -> dict[str, Any]:
    shown = CliRunner().invoke(app, ["measure", *map(str, arguments), "--json"])
    assert shown.exit_code == 0, shown.output
    return json.loads(shown.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def scenes() -> np.ndarray:
    return true_scenes(24, 0)


def test_a_copied_training_image_is_named_and_shown(tmp_path: Path, scenes: np.ndarray) -> None:
    generated = save(np.stack([true_scenes(1, 5)[0], scenes[17]]), tmp_path / "generated")
    training, sheet = save(scenes, tmp_path / "training"), tmp_path / "new" / "sheet.png"
    found = measured(generated, "--memorised", training, "--sheet", sheet)
    first, second = found["nearest"]
    assert (first["file"], first["nearest"], first["authentic"]) == ("0001.png", "0017.png", False)
    assert first["cosine"] == pytest.approx(1, abs=1e-5) and second["cosine"] < 0.999
    assert found["metrics"]["nearest_max"] == first["cosine"] and 0 <= found["metrics"]["authentic"] <= 0.5
    assert "0001.png is most like 0017.png, cosine 1.000, nearer to it than any other" in found["notes"][0]
    drawn = np.asarray(Image.open(sheet))
    assert np.array_equal(drawn[:128, :128], drawn[:128, 130:258])  # the same picture twice


def bank_of(latents: torch.Tensor, captions: list[str], encoder: str) -> LatentBank:
    shard = Shard(latents.half(), {ORIGINAL: torch.arange(len(latents))})
    return LatentBank.of_shards([shard], captions, encoder=encoder)


def test_a_bank_is_decoded_by_the_model_that_encoded_it(tmp_path: Path, scenes: np.ndarray) -> None:
    model = ModelConfig(path=str(SHIPPED / "pipeline"))
    latents = load_encoders(model, text=False).encode_images(torch.from_numpy(scenes[:12]))
    captions = [f"scene {i}" for i in range(12)]
    save_bank(tmp_path / "bank", bank_of(latents, captions, encoder_hash(model)))
    generated = save(scenes[[4, 9]], tmp_path / "generated")
    found = measured(generated, "--memorised", tmp_path / "bank", "--model", "shapes", "--sheet", tmp_path / "s.png")
    assert {(row["file"], row["nearest"], row["caption"]) for row in found["nearest"]} == {
        ("0000.png", "latent 4", "scene 4"),
        ("0001.png", "latent 9", "scene 9"),
    }
    assert found["metrics"]["nearest_mean"] > 0.98 and (tmp_path / "s.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--memorised", "{bank}"], "--model: is missing, and .*bank holds latents"),
        (["--memorised", "{bank}", "--model", "shapes"], "--model: .* is not what encoded .*bank"),
        (["--memorised", "{gone}"], "--memorised: .*gone is not a directory"),
        (["--memorised", "{single}"], "--memorised: .*single holds one image"),
        (["--memorised", "{broken}"], "--memorised: .*"),
        (["--memorised", "{single}", "--sheet", "{bank}"], "--sheet: .*bank is a directory; name a file"),
        (["--memorised", "{single}", "--sheet", "{bank}/manifest.json/s.png"], "--sheet: .* is not a directory"),
        (["--sheet", "{gone}"], "--sheet: is of --memorised TRAINING; give that too"),
        (["--model", "shapes"], "--model: is of --memorised TRAINING; give that too"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, scenes: np.ndarray, given: list[str], said: str) -> None:
    places = {name: str(tmp_path / name) for name in ("bank", "gone", "single", "broken")}
    save_bank(tmp_path / "bank", bank_of(torch.zeros(2, 16, 8, 8), ["a", "b"], "another"))
    save(scenes[:1], tmp_path / "single")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{}")
    generated = save(scenes[:2], tmp_path / "generated")
    more = ["--model", "shapes"] if "{broken}" in given else []
    shown = CliRunner().invoke(app, ["measure", str(generated), *(text.format(**places) for text in given), *more])
    assert shown.exit_code == 2, shown.output
    assert re.search(said, " ".join(shown.stderr.split())), shown.stderr
