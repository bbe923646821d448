"""image_similarity against DreamBench++ on the same random towers, and what it takes and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from rewards.interface import Asked, InputError, SpecError, call
from rewards.resolve import check, resolve
from tests.rewards._published import answers, picture, save_image_similarity

PUBLISHED = answers("image_similarity")


@pytest.fixture(scope="module", params=sorted(PUBLISHED["models"]))
def tower(request, tmp_path_factory) -> tuple[str, dict[str, Any]]:
    """The directory of a tower, and what the public code answered with it."""
    kind = request.param
    return save_image_similarity(tmp_path_factory.mktemp(kind), kind), PUBLISHED["models"][kind]


def score(scorer: Any, images: list[np.ndarray], references: list[np.ndarray]) -> np.ndarray:
    n = len(images)
    asked = Asked(np.stack(images), [""] * n, [{}] * n, references=references)
    return call("image_similarity", scorer, asked)["image_similarity"]


def test_scores_are_those_of_the_public_code(tower):
    path, found = tower
    scorer = resolve({"type": "image_similarity", "path": path})
    pairs = [(picture(*case["picture"]), picture(*case["reference"])) for case in found["cases"]]
    scores = np.concatenate([score(scorer, [image], [reference]) for image, reference in pairs])
    np.testing.assert_allclose(scores, [case["score"] for case in found["cases"]], atol=1e-4)
    assert np.ptp(scores) > 0.1


def test_a_score_does_not_depend_on_its_neighbours(tower):
    scorer = resolve({"type": "image_similarity", "path": tower[0], "batch_size": 3})
    images = [picture(seed, 40, 56) for seed in range(5)]
    same = picture(9, 32, 32)
    references = [same, picture(1, 40, 56), picture(10, 31, 90), same, same]
    alone = np.concatenate([score(scorer, [image], [one]) for image, one in zip(images, references, strict=True)])
    np.testing.assert_allclose(score(scorer, images, references), alone, atol=1e-6)
    assert alone[1] == pytest.approx(1, abs=1e-6) and len(set(alone.round(6))) == 5


def test_a_picture_longer_than_16_to_1_is_cut_to_its_middle(tower):
    scorer = resolve({"type": "image_similarity", "path": tower[0]})
    long = picture(0, 9, 3001)
    assert score(scorer, [long[:, 1428:1572]], [long]) == pytest.approx(1, abs=1e-6)


def test_it_needs_references():
    path = "flowalign/shapes/assets/pickscore"
    assert check({"type": "image_similarity", "path": path}) == {"references"}
    with pytest.raises(InputError, match="needs 'references' and was asked without"):
        call("image_similarity", resolve({"type": "image_similarity", "path": path}), Asked(*no_references()))


def no_references() -> tuple[np.ndarray, list[str], list[dict]]:
    return np.stack([picture(0, 8, 8)]), [""], [{}]


def test_a_directory_that_is_no_tower_is_refused(tower, tmp_path):
    for name, content, said in (
        ("config.json", None, r"holds no config\.json; give the directory of a transformers CLIPModel or Dinov2Model"),
        ("config.json", "{", r"config\.json is no JSON"),
        ("config.json", '{"model_type": "bert"}', "is a 'bert'; give one of clip, clip_vision_model, dinov2"),
        ("config.json", '{"model_type": "clip", "auto_map": {"AutoModel": "x.Y"}}', "names code of its own"),
        ("config.json", '{"model_type": ["clip"]}', r"is a \['clip'\]; give one of clip"),
        ("model.safetensors", "{}", "did not load as a .* \\(Error while deserializing header"),
        ("preprocessor_config.json", None, r"holds no preprocessor_config\.json or processor_config\.json"),
    ):
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        directory.mkdir()
        for file in Path(tower[0]).iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        (directory / name).unlink()
        if content is not None:
            (directory / name).write_text(content)
        with pytest.raises(SpecError, match=f"image_similarity: .*{said}"):
            scorer: Any = resolve({"type": "image_similarity", "path": str(directory)})
            scorer.setup("cpu")
    with pytest.raises(SpecError, match="dtype 'fp16' is unknown"):
        resolve({"type": "image_similarity", "path": tower[0], "dtype": "fp16"})


def test_weights_that_are_missing_are_refused_and_not_drawn(tower, tmp_path):
    path = save_image_similarity(tmp_path, tower[1]["config"]["model_type"])
    tensors = load_file(f"{path}/model.safetensors")
    lost = next(name for name in tensors if "norm" in name and "text" not in name)
    save_file({k: v for k, v in tensors.items() if k != lost}, f"{path}/model.safetensors", metadata={"format": "pt"})
    scorer: Any = resolve({"type": "image_similarity", "path": path})
    with pytest.raises(SpecError, match="lacks the weights"):
        scorer.setup("cpu")
