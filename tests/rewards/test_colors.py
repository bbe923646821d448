"""GenEval's colour classifier: against its published procedure, and against shapes whose colour is known."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowalign.config.sections import RewardConfig
from flowalign.intake.paths import resolve_reward
from flowalign.shapes.render import Thing, render, render_with_masks
from rewards.geneval.colors import BENCHMARK_COLORS, ZeroShotColors, crop
from rewards.geneval.detectors.palette import COLORS, SHAPES
from rewards.interface import SpecError


@pytest.fixture(scope="module")
def shipped() -> str:
    """The directory of the embedded world's own CLIP, found as a configuration finds it."""
    reward = RewardConfig(spec="clip", options={"path": "shapes:open_clip"})
    return resolve_reward(reward, Path(), "rewards.0").options["path"]


@lru_cache
def loaded_by_hand(path: str) -> tuple[Any, Any, Any]:
    """Model, PIL transform and tokenizer."""
    import open_clip

    loaded: Any = open_clip.create_model_and_transforms(f"local-dir:{path}")
    return loaded[0].eval(), loaded[2], open_clip.get_tokenizer(f"local-dir:{path}")


def literal(path: str, image: np.ndarray, box: list[float], mask: np.ndarray, thing: str, names) -> torch.Tensor:
    """One object's cosine with each colour, in the words of the benchmark's ``evaluate_images.py``."""
    model, transform, tokenizer = loaded_by_hand(path)
    blank = Image.new("RGB", (image.shape[1], image.shape[0]), color="#999")
    seen = Image.composite(Image.fromarray(image), blank, Image.fromarray(mask)).crop((box[0], box[1], box[2], box[3]))
    with torch.inference_mode():
        feature = model.encode_image(transform(seen)[None])[0]
        feature /= feature.norm()
        cosines = []
        for color in names:
            phrases = [
                f"a photo of a {color} {thing}",
                f"a photo of a {color}-colored {thing}",
                f"a photo of a {color} object",
            ]
            rows = [model.encode_text(tokenizer([phrase]))[0] for phrase in phrases]
            mean = torch.stack([row / row.norm() for row in rows]).mean(0)
            cosines.append(feature @ (mean / mean.norm()))
    return torch.stack(cosines)


def tiles() -> tuple[np.ndarray, list[list[float]], list[np.ndarray]]:
    """Twelve shapes in an image of 3 × 4 tiles, each as large as the shipped model's input, with a part masked out."""
    rng = np.random.default_rng(7)
    image = np.zeros((3 * 64, 4 * 64, 3), np.uint8)
    boxes, masks = [], []
    for i in range(12):
        y, x = 64 * (i // 4), 64 * (i % 4)
        image[y : y + 64, x : x + 64] = render([Thing(SHAPES[i % 6], list(COLORS)[i % 7], (i % 2, i // 2 % 2))], rng)
        top, left = rng.integers(0, 44, 2)
        mask = np.ones(image.shape[:2], bool)
        mask[y + top : y + top + 20, x + left : x + left + 20] = False
        boxes.append([float(x), float(y), float(x + 64), float(y + 64)])
        masks.append(mask)
    return image, boxes, masks


@pytest.mark.parametrize("names", [BENCHMARK_COLORS, tuple(COLORS)])
def test_colours_are_those_of_the_published_procedure(shipped, names):
    image, boxes, masks = tiles()
    got = ZeroShotColors(path=shipped, names=names).classify(image, boxes, masks, "square")
    want = [
        names[int(literal(shipped, image, box, mask, "square", names).argmax())]
        for box, mask in zip(boxes, masks, strict=True)
    ]
    assert got == want
    assert len(set(got)) >= 5


def test_embeddings_of_a_class_are_the_normalised_means_of_its_three_phrases(shipped):
    """Where nothing is resized the cosines agree to rounding, not only the best colour."""
    image, boxes, masks = tiles()
    colors = ZeroShotColors(path=shipped)
    for box, mask in zip(boxes[:3], masks[:3], strict=True):
        with torch.inference_mode():
            got = (colors.clip.images(crop(image, box, mask)[None]) @ colors._of("ring").T)[0]
        want = literal(shipped, image, box, mask, "ring", BENCHMARK_COLORS)
        np.testing.assert_allclose(got.numpy(), want.numpy(), atol=1e-5)


def test_the_object_is_shown_on_grey_and_the_edges_of_its_box_are_rounded():
    image = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    mask = np.random.default_rng(1).random((9, 11)) < 0.5
    shown = crop(image, [1.6, 2.4, 8.7, 7.2], mask)
    assert shown.shape == (5, 7, 3)
    for y in range(5):
        for x in range(7):
            expected = image[y + 2, x + 2] if mask[y + 2, x + 2] else (0x99, 0x99, 0x99)
            assert tuple(shown[y, x]) == tuple(expected)


def test_objects_classified_together_and_alone_have_the_same_colours(shipped):
    image, boxes, masks = tiles()
    colors = ZeroShotColors(path=shipped)
    boxes = [[x0, y0, x0 + 9 + 3 * i, y0 + 40 - 2 * i] for i, (x0, y0, *_) in enumerate(boxes)]
    alone = [colors.classify(image, [box], [mask], "star")[0] for box, mask in zip(boxes, masks, strict=True)]
    assert colors.classify(image, boxes, masks, "star") == alone


def test_the_shipped_model_names_the_colours_of_shapes(shipped):
    """150 shapes, 7 colours; the bounds leave margin under what was measured.

    Alone on the dark ground that the model was trained on, uncut, 149 are named rightly. As GenEval shows them, on grey
    and enlarged to their box, which the model has never seen, 82 are; chance is 21.
    """
    rng = np.random.default_rng(11)
    colors = ZeroShotColors(path=shipped, names=tuple(COLORS))
    whole = np.ones((64, 64), bool)
    own_ground = benchmark = 0
    for i in range(150):
        thing = Thing(str(rng.choice(SHAPES)), str(rng.choice(list(COLORS))), (i % 2, i // 2 % 2))
        image, coverage = render_with_masks([thing], rng)
        mask = coverage[0] >= 0.5
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        box = [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]
        named = colors.classify(image, [[0, 0, 64, 64], box], [whole, mask], thing.shape)
        own_ground += named[0] == thing.color
        benchmark += named[1] == thing.color
    assert own_ground >= 140, own_ground
    assert benchmark >= 60, benchmark


def test_a_classifier_of_one_colour_or_without_a_model_is_refused(shipped):
    with pytest.raises(SpecError, match="at least two colour names"):
        ZeroShotColors(path=shipped, names=["red"])
    with pytest.raises(SpecError, match="colour classifier: give either `path`"):
        ZeroShotColors()
