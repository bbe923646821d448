"""clip_iqa against piq on the same random CLIP, and what it takes and refuses."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flowalign.config.sections import SHIPPED
from rewards.interface import SpecError
from rewards.resolve import resolve
from tests.rewards._published import answers, picture, weights

PUBLISHED = answers("clip_iqa")
OPENAI = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    """A directory in open_clip's layout, whose names of weights are those of OpenAI's files."""
    directory: Path = tmp_path_factory.mktemp("clip_iqa")
    tensors = {name: torch.from_numpy(one) for name, one in weights(PUBLISHED["weights"], PUBLISHED["seed"]).items()}
    save_file(tensors, str(directory / "open_clip_model.safetensors"))
    config = {"model_cfg": PUBLISHED["config"], "preprocess_cfg": {**OPENAI, "interpolation": "bicubic"}}
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    return str(directory)


def score(scorer: Any, images: list[np.ndarray]) -> np.ndarray:
    return scorer.score(np.stack(images), ["a prompt"] * len(images), [{}] * len(images))["clip_iqa"]


def test_scores_are_those_of_the_public_code(path):
    for texts, cases in groupby(PUBLISHED["cases"], lambda case: (case["good"], case["bad"])):
        scorer = resolve({"type": "clip_iqa", "path": path, "good": texts[0], "bad": texts[1]})
        found, expected = zip(*((score(scorer, [picture(*c["picture"])]).item(), c["score"]) for c in cases), strict=True)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert np.ptp(expected) > 0.01


def test_a_score_does_not_depend_on_its_neighbours(path):
    scorer = resolve({"type": "clip_iqa", "path": path, "batch_size": 3})
    images = [picture(seed, 40, 70) for seed in range(5)]
    alone = np.concatenate([score(scorer, [image]) for image in images])
    np.testing.assert_allclose(score(scorer, images), alone, atol=1e-6)
    assert len(set(alone.round(5))) == 5


def test_an_image_is_neither_cut_nor_resized_unless_it_is_below_32_pixels(path):
    """The far end of a long image counts; a tiny one is seen as the same one enlarged."""
    scorer: Any = resolve({"type": "clip_iqa", "path": path})
    long = picture(0, 64, 320)
    other = long.copy()
    other[:, -32:] = 255
    assert abs(np.diff(score(scorer, [long, other])).item()) > 1e-4
    assert scorer._pixels(long[None]).shape == (1, 3, 64, 320)
    assert scorer._pixels(long[None, :1, :1]).shape == (1, 3, 32, 32)


def test_good_and_bad_exchanged_give_the_rest_to_1(path):
    images = [picture(seed, 64, 64) for seed in range(3)]
    one = score(resolve({"type": "clip_iqa", "path": path}), images)
    other = score(resolve({"type": "clip_iqa", "path": path, "good": "Bad photo.", "bad": "Good photo."}), images)
    np.testing.assert_allclose(one + other, 1, atol=1e-6)


def test_a_clip_without_a_resnet_and_texts_that_do_not_differ_are_refused(path):
    vit: Any = resolve({"type": "clip_iqa", "path": str(SHIPPED / "open_clip")})
    with pytest.raises(SpecError, match="clip_iqa: .*has no ResNet with attention pooling; give one such as"):
        vit.setup("cpu")
    for texts in ({"good": " "}, {"good": "Bad photo."}):
        with pytest.raises(SpecError, match="write two texts that differ"):
            resolve({"type": "clip_iqa", "path": path, **texts})
    with pytest.raises(SpecError, match="clip_iqa: give either `path`"):
        resolve({"type": "clip_iqa"})
