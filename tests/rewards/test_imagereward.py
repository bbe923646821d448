"""imagereward against the public package on the same random weights, and what it takes and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rewards.interface import SpecError
from rewards.resolve import bounds, resolve
from tests.rewards._published import answers, picture, save_imagereward

PUBLISHED = answers("imagereward")
PROMPTS = ["a red circle", "two small dogs", "", "a red circle", "the cat on the table " * 20]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return save_imagereward(tmp_path_factory.mktemp("imagereward"))


def score(scorer: Any, images: list[np.ndarray], prompts: list[str]) -> np.ndarray:
    return scorer.score(np.stack(images), prompts, [{}] * len(images))["imagereward"]


def test_scores_are_those_of_the_public_package(path):
    scorer: Any = resolve({"type": "imagereward", "path": path})
    scores = [score(scorer, [picture(*case["picture"])], [case["prompt"]]).item() for case in PUBLISHED["cases"]]
    expected = [case["score"] for case in PUBLISHED["cases"]]
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert np.ptp(expected) > 1
    assert bounds({"type": "imagereward", "path": path}) == (-1e6, 1e6)


def test_the_published_file_scores_as_its_tensors(path, tmp_path):
    """It is torch's format, and holds a buffer that newer versions of transformers do not keep."""
    images = [picture(seed, 48, 40) for seed in range(2)]
    file = Path(save_imagereward(tmp_path, "ImageReward.pt")) / "ImageReward.pt"
    buffer = {"blip.text_encoder.embeddings.position_ids": torch.arange(64)[None]}
    torch.save({**torch.load(file), **buffer}, file)
    ours, theirs = (
        score(resolve({"type": "imagereward", "path": directory}), images, PROMPTS[:2])
        for directory in (path, str(tmp_path))
    )
    np.testing.assert_array_equal(ours, theirs)


def test_a_score_does_not_depend_on_its_neighbours(path):
    scorer: Any = resolve({"type": "imagereward", "path": path, "batch_size": 3})
    images = [picture(seed, 40, 56) for seed in range(5)]
    alone = [score(scorer, [image], [prompt]).item() for image, prompt in zip(images, PROMPTS, strict=True)]
    np.testing.assert_allclose(score(scorer, images, PROMPTS), alone, atol=1e-5)
    assert len(set(np.round(alone, 4))) == 5


def test_the_prompt_counts_up_to_33_word_pieces(path):
    scorer: Any = resolve({"type": "imagereward", "path": path})
    image = [picture(0, 32, 32)] * 3
    scores = score(scorer, image, ["dog " * 33, "dog " * 33 + "cat", "dog " * 32 + "cat"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-6) and abs(scores[0] - scores[2]) > 1e-3


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "model.safetensors",
            None,
            r"holds no model\.safetensors or ImageReward\.safetensors or ImageReward\.pt; give",
        ),
        ("med_config.json", None, r"holds no med_config\.json; give the directory of THUDM/ImageReward"),
        ("vocab.txt", None, r"holds no tokenizer\.json or vocab\.txt; give that of bert-base-uncased as `processor`"),
        ("model.safetensors", b"no", r"model\.safetensors did not load as ImageReward \(it holds no weights"),
        ("med_config.json", b"{", "did not load as ImageReward"),
        ("med_config.json", b"{}", "did not load as ImageReward"),
        ("med_config.json", b"[]", "did not load as ImageReward"),
    ],
)
def test_a_directory_that_is_not_imagereward_is_refused(name, content, said, path, tmp_path):
    for file in Path(path).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SpecError, match=f"imagereward: .*{said}"):
        scorer: Any = resolve({"type": "imagereward", "path": str(tmp_path)})
        scorer.setup("cpu")


def test_a_published_file_without_tensors_by_name_is_refused(path, tmp_path):
    for name in ("med_config.json", "vocab.txt"):
        (tmp_path / name).write_bytes((Path(path) / name).read_bytes())
    torch.save([1], tmp_path / "ImageReward.pt")
    scorer: Any = resolve({"type": "imagereward", "path": str(tmp_path)})
    with pytest.raises(SpecError, match="did not load as ImageReward"):
        scorer.setup("cpu")


@pytest.mark.parametrize("lost", ["blip.visual_encoder.blocks.1.", "blip.text_encoder.encoder.layer.0.", "mlp."])
def test_weights_that_are_missing_are_refused_and_not_drawn(lost, path, tmp_path):
    tensors = load_file(save_imagereward(tmp_path) + "/model.safetensors")
    first = next(name for name in tensors if name.startswith(lost))
    save_file({k: v for k, v in tensors.items() if k != first}, str(tmp_path / "model.safetensors"))
    with pytest.raises(SpecError, match="imagereward: "):
        scorer: Any = resolve({"type": "imagereward", "path": str(tmp_path)})
        scorer.setup("cpu")
