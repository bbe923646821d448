"""clip_iqa against piq on the same random CLIP, and what it takes and refuses."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import pytest

from flowalign.config.sections import SHIPPED
from rewards.interface import SpecError
from rewards.resolve import resolve
from tests.rewards._published import answers, picture, save_clip_iqa

PUBLISHED = answers("clip_iqa")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return save_clip_iqa(tmp_path_factory.mktemp("clip_iqa"))


def score(scorer: Any, images: list[np.ndarray]) -> np.ndarray:
    return scorer.score(np.stack(images), ["a prompt"] * len(images), [{}] * len(images))["clip_iqa"]


def test_scores_are_those_of_the_public_code(path):
    for texts, cases in groupby(PUBLISHED["cases"], lambda case: (case["good"], case["bad"])):
        scorer = resolve({"type": "clip_iqa", "path": path, "good": texts[0], "bad": texts[1]})
        found, expected = zip(
            *((score(scorer, [picture(*c["picture"])]).item(), c["score"]) for c in cases), strict=True
        )
        np.testing.assert_allclose(found, expected, rtol=2e-4)
        assert max(expected) > 1.3 * min(expected)


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
    one, changed = score(scorer, [long, other])
    assert abs(one - changed) > 1e-3 * one
    assert scorer._pixels(long[None]).shape == (1, 3, 64, 320)
    assert scorer._pixels(long[None, :1, :1]).shape == (1, 3, 32, 32)


def test_good_and_bad_exchanged_give_the_rest_to_1(path):
    images = [picture(seed, 64, 64) for seed in range(3)]
    one = score(resolve({"type": "clip_iqa", "path": path}), images)
    other = score(resolve({"type": "clip_iqa", "path": path, "good": "Bad photo.", "bad": "Good photo."}), images)
    np.testing.assert_allclose(one + other, 1, atol=1e-6)


def test_a_clip_without_a_resnet_and_texts_that_do_not_differ_are_refused(path):
    vit: Any = resolve({"type": "clip_iqa", "path": str(SHIPPED / "open_clip")})
    with pytest.raises(SpecError, match=r"clip_iqa: .*has no ResNet with attention pooling; give one such as"):
        vit.setup("cpu")
    for texts in ({"good": " "}, {"good": "Bad photo."}):
        with pytest.raises(SpecError, match="write two texts that differ"):
            resolve({"type": "clip_iqa", "path": path, **texts})
    with pytest.raises(SpecError, match="clip_iqa: give either `path`"):
        resolve({"type": "clip_iqa"})
