from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from flowalign.cli import app
from flowalign.cli.terminal import console
from flowalign.config.section import ConfigError
from flowalign.config.sections import SHIPPED
from flowalign.making.measuring import METRICS, reference_metrics, true_scenes
from flowalign.measure.distances import clip_score, clip_scores, frechet_distance, kernel_distance, precision_recall
from flowalign.measure.evaluate import EvaluationResult
from flowalign.measure.features import OpenClipFeatures
from flowalign.shapes.prompts import evaluation_set
from rewards.models.openclip import OpenClip

CLIP = SHIPPED / "open_clip"


OWN = """
import numpy as np
def means(images, scale=1):
    return scale * images.reshape(len(images), -1, 3).mean(1)
def flat(images):
    return images.mean()
def by_size(images):
    return np.zeros((len(images), images.shape[1]))
def broken(images):
    raise KeyError("gone")
number = 3
"""


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


def shipped_clip() -> OpenClip:
    return OpenClip("test", path=str(CLIP))


def save(images: np.ndarray, folder: Path, prompts: list[str] | None = None) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:04d}.png")
    if prompts is not None:
        rows = [{"file": f"{i:04d}.png", "prompt": prompt} for i, prompt in enumerate(prompts)]
        (folder / "index.json").write_text(json.dumps(rows))
    return folder


def measured(*arguments: str | int | Path) -> dict:
    shown = CliRunner().invoke(app, ["measure", *map(str, arguments), "--json"])
    assert shown.exit_code == 0, shown.output
    return json.loads(shown.stdout.splitlines()[-1])


def refusal(*arguments: str | Path) -> str:
    shown = CliRunner().invoke(app, ["measure", *map(str, arguments)])
    assert shown.exit_code == 2, shown.output
    return shown.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Twelve true scenes with their prompts, and twenty others."""
    root = tmp_path_factory.mktemp("folders")
    prompts = [str(row["prompt"]) for row in evaluation_set(12)]
    return save(true_scenes(12, 0), root / "generated", prompts), save(true_scenes(20, 1), root / "reference")


def test_a_folder_is_measured_against_another_and_its_prompts(folders: tuple[Path, Path]) -> None:
    found = measured(folders[0], "--reference", folders[1])
    a, b = (OpenClipFeatures(shipped_clip())(true_scenes(*made)) for made in ((12, 0), (20, 1)))
    expected = frechet_distance(a, b), kernel_distance(a, b), *precision_recall(b, a)
    scores = clip_scores(true_scenes(12, 0), [str(row["prompt"]) for row in evaluation_set(12)], shipped_clip())
    assert tuple(found["metrics"]) == METRICS
    assert tuple(found["metrics"].values()) == pytest.approx((*expected, scores.mean()), rel=1e-4)
    assert found["clip_scores"] == pytest.approx(scores, abs=1e-3)
    assert (found["images"], found["reference_images"], found["files"][0]) == (12, 20, "0000.png")
    assert "12 images for 96 features leave the covariance rank-deficient" in found["notes"][0]
    assert found["notes"][1].startswith("kid: of 12 images it is right on average and scatters widely")


def test_only_the_metrics_asked_for_are_measured_and_true_scenes_may_be_the_reference(
    folders: tuple[Path, Path],
) -> None:
    drawn = measured(folders[0], "--reference", "shapes:eval", "--num-reference", 20, "--seed", 1, "--metrics", "kid")
    saved = measured(folders[0], "--reference", folders[1], "--metrics", "kid")
    assert drawn["metrics"] == pytest.approx(saved["metrics"], rel=1e-4) and list(drawn["metrics"]) == ["kid"]
    assert [note.partition(":")[0] for note in drawn["notes"]] == ["kid"] and "clip_scores" not in drawn
    assert list(measured(folders[0])["metrics"]) == ["clip"]
    assert list(measured(folders[1], "--reference", folders[0])["metrics"]) == ["fid", "kid", "precision", "recall"]


def test_images_of_different_sizes_keep_their_own_prompts(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    images, prompts = true_scenes(6, 0), [str(row["prompt"]) for row in evaluation_set(6)]
    folder = save(images, tmp_path / "mixed", prompts)
    for i in (1, 4):
        Image.fromarray(images[i]).resize((128, 128), Image.Resampling.NEAREST).save(folder / f"{i:04d}.png")
    same = clip_scores(images, prompts, shipped_clip())
    found = measured(folder, "--reference", folders[1])
    assert found["clip_scores"] == pytest.approx(same, abs=8)
    assert np.ptp(same) > 16


def test_an_extractor_of_the_users_own_is_named_on_the_command_line(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    (tmp_path / "own.py").write_text(OWN)
    images = np.concatenate([true_scenes(6, 0), noise(6)])
    half_noise = save(images, tmp_path / "half_noise")
    found = measured(half_noise, "--reference", folders[1], "--extractor", f"{tmp_path / 'own.py'}:means")
    a, b = images.mean((1, 2)), true_scenes(20, 1).mean((1, 2))
    assert found["metrics"]["fid"] == pytest.approx(frechet_distance(a, b), rel=1e-3)
    expected = precision_recall(b, a)
    assert (found["metrics"]["precision"], found["metrics"]["recall"]) == expected
    assert expected.precision != expected.recall
    assert not any(note.startswith("fid") for note in found["notes"])


def test_bad_input_of_the_command_is_refused_in_one_sentence(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    good, reference = folders
    broken, spoilt = (
        save(noise(count), tmp_path / name, ["p"] * count) for name, count in (("broken", 3), ("spoilt", 1))
    )
    for folder in (broken, spoilt):
        (folder / "0000.png").write_bytes(b"no image")
    few = save(noise(2), tmp_path / "few")
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    said = {
        "GENERATED: " + f"{tmp_path / 'absent'} is not a directory": (tmp_path / "absent", "--reference", reference),
        f"GENERATED: none of 1 images can be read ({spoilt / '0000.png'} is no image file)": (
            spoilt,
            "--metrics",
            "clip",
        ),
        f"--reference: none of 1 images can be read ({spoilt}": (good, "--reference", spoilt),
        "2 generated images and 20 of the reference": (broken, "--reference", reference),
        "2 generated images and 20 of the reference; fid, kid": (few, "--reference", reference),
        "--reference: is missing, and so are prompts": (reference,),
        "--reference: is missing, and fid needs it": (good, "--metrics", "fid"),
        "--prompts: is missing, and clip needs it": (reference, "--reference", good, "--metrics", "clip"),
        "prompts.txt has 2 rows for 12 images": (good, "--prompts", tmp_path / "prompts.txt"),
        "no metric 'kit'; did you mean kid?": (good, "--reference", reference, "--metrics", "fid,kit"),
        "write shapes:eval or a folder": (good, "--reference", "shapes:train"),
        "no shipped model 'openclip'": (good, "--clip", "shapes:openclip"),
        "--extractor: is not JSON": (good, "--reference", reference, "--extractor", "{type"),
        "--clip: got an unexpected keyword argument 'modl'": (good, "--clip", '{"modl": "a"}'),
    }
    for sentence, arguments in said.items():
        shown = refusal(*arguments)
        assert sentence in shown and shown.count("\n") == 1


def test_an_evaluation_gets_the_metrics_of_its_images() -> None:
    rows = [{"prompt": str(row["prompt"])} for row in evaluation_set(12)]
    result = EvaluationResult(Path("run"), "model", 3, {}, rows, torch.from_numpy(true_scenes(12, 0)))
    found = reference_metrics("shapes:eval", 12, "shapes:open_clip", "shapes:open_clip", "cpu", console(True).print)(
        result
    )
    a = OpenClipFeatures(shipped_clip())(true_scenes(12, 0))
    assert found["eval/fid"] == pytest.approx(frechet_distance(a, a), abs=1e-3)
    assert (found["eval/precision"], found["eval/recall"]) == (1, 1)
    prompts = [row["prompt"] for row in rows]
    assert found["eval/clip_score"] == pytest.approx(clip_score(true_scenes(12, 0), prompts, shipped_clip()))
    assert len(found) == 4


def test_an_evaluation_of_too_few_samples_is_refused_before_they_are_made() -> None:
    with pytest.raises(
        ConfigError, match="3 generated images and 3 of the reference; precision, recall need at least 4"
    ):
        reference_metrics("shapes:eval", 3, "shapes:open_clip", "shapes:open_clip", "cpu", console(True).print)


def test_what_cannot_be_read_is_left_out_of_a_measure_counted_and_named(
    tmp_path: Path, folders: tuple[Path, Path]
) -> None:
    images, prompts = true_scenes(12, 0), [str(row["prompt"]) for row in evaluation_set(12)]
    folder = save(images, tmp_path / "blemished", prompts)
    whole = (folder / "0005.png").read_bytes()
    (folder / "0005.png").write_bytes(whole[: len(whole) // 2])  # found when it is decoded
    (folder / "0007.png").write_bytes(b"<html>")  # found before
    (folder / "phone.heic").write_bytes(b"")
    found = measured(folder, "--reference", folders[1])
    kept = [i for i in range(12) if i not in (5, 7)]
    assert (
        list(found["left_out"]["generated"]) == ["0005.png", "0007.png", "phone.heic"]
        and found["left_out"]["reference"] == {}
    )
    assert (found["images"], found["files"]) == (10, [f"{i:04d}.png" for i in kept])
    assert found["clip_scores"] == pytest.approx(
        clip_scores(images[kept], [prompts[i] for i in kept], shipped_clip()), abs=1e-3
    )
    a, b = (OpenClipFeatures(shipped_clip())(made) for made in (images[kept], true_scenes(20, 1)))
    assert found["metrics"]["kid"] == pytest.approx(kernel_distance(a, b), rel=1e-4)
    shown = CliRunner().invoke(app, ["measure", str(folder)]).stdout
    lines = [line.strip() for line in shown.splitlines()]
    assert f"left out 3 of 13 images of {folder}:" in lines
    assert "0007.png is a web page; only PNG, JPEG, WebP, TIFF, BMP and GIF are read" in lines
    assert "phone.heic is in a format that is not read; PNG, JPEG, WebP, TIFF, BMP and GIF are" in lines
