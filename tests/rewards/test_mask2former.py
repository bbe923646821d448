"""GenEval's detector without mmdet: its post-processing against a literal reference, the real transformers class."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.geneval.detectors import load_detector
from rewards.geneval.detectors.mask2former import COCO_NAMES, Mask2formerDetector, instances
from rewards.interface import SpecError
from rewards.resolve import resolve
from tests.rewards._mask2former import save_tiny_mask2former

GENEVAL = Path(__file__).parents[3] / "shared" / "data" / "geneval"


def bilinear(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear resize with half-pixel centres, one pixel at a time."""
    out = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            y = max((i + 0.5) * plane.shape[0] / height - 0.5, 0)
            x = max((j + 0.5) * plane.shape[1] / width - 0.5, 0)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, plane.shape[0] - 1), min(x0 + 1, plane.shape[1] - 1)
            top = plane[y0, x0] * (1 - (x - x0)) + plane[y0, x1] * (x - x0)
            low = plane[y1, x0] * (1 - (x - x0)) + plane[y1, x1] * (x - x0)
            out[i, j] = top * (1 - (y - y0)) + low * (y - y0)
    return out


def literal(classes, masks, input_size, content, size, limit):
    """The benchmark's post-processing, one query and class at a time: [(score, label, box, mask)]."""
    pairs = []
    for q, row in enumerate(classes.tolist()):
        total = sum(math.exp(v) for v in row)
        for c, value in enumerate(row[:-1]):
            pairs.append((math.exp(value) / total, q, c))
    pairs.sort(key=lambda pair: -pair[0])
    found = []
    for probability, q, c in pairs[:limit]:
        upsampled = bilinear(masks[q].numpy().astype(float), *input_size)[: content[0], : content[1]]
        plane = bilinear(upsampled, *size)
        inside = plane > 0
        if not inside.any():
            continue
        mean = sum(1 / (1 + math.exp(-v)) for v in plane[inside]) / (inside.sum() + 1e-6)
        ys, xs = np.nonzero(inside)
        box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        found.append((probability * mean, c, box, inside))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_post_processing_equals_a_literal_reference_on_random_logits(seed):
    random = torch.Generator().manual_seed(seed)
    classes = torch.randn(7, 5, generator=random) * 3
    masks = torch.randn(7, 6, 8, generator=random) * 4 - 1
    if seed == 5:
        masks[2] = -1.0  # empty everywhere: it must be dropped
    sizes = ((24, 32), (24, 26) if seed % 2 else (24, 32), (15, 17))
    got = instances(classes, masks, *sizes, 12)
    want = literal(classes, masks, *sizes, 12)
    order = got.scores_M.argsort(descending=True)
    want.sort(key=lambda item: -item[0])
    assert len(order) == len(want) > 0
    np.testing.assert_allclose(got.scores_M[order], [item[0] for item in want], atol=1e-5)
    assert got.labels_M[order].tolist() == [item[1] for item in want]
    assert got.boxes_M4[order].tolist() == [[float(e) for e in item[2]] for item in want]
    for mask, item in zip(got.masks_MHW[order], want, strict=True):
        assert (mask.numpy() == item[3]).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30))
def test_scores_are_probabilities_and_no_more_than_asked(seed, limit):
    random = torch.Generator().manual_seed(seed)
    classes, masks = torch.randn(9, 4, generator=random) * 5, torch.randn(9, 5, 5, generator=random)
    got = instances(classes, masks, (20, 20), (20, 20), (20, 20), limit)
    assert len(got.scores_M) <= limit
    assert bool((got.scores_M >= 0).all()) and bool((got.scores_M <= 1).all())
    assert bool(got.masks_MHW.flatten(1).any(1).all())


@pytest.mark.skipif(not GENEVAL.is_dir(), reason="GenEval's prompts are not beside the project")
def test_every_class_of_the_public_prompts_is_one_of_the_detector_s():
    rows = [json.loads(line) for path in GENEVAL.glob("*.jsonl") for line in path.read_text().splitlines()]
    names = (GENEVAL / "object_names.txt").read_text().splitlines()
    assert tuple(name.strip() for name in names if name.strip()) == COCO_NAMES
    asked = {clause["class"] for row in rows for clause in row["include"]}
    assert asked and asked <= set(COCO_NAMES)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_mask2former(tmp_path_factory.mktemp("mask2former"))


def pictures(count=5, height=48, width=64):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_a_saved_model_detects_the_same_one_by_one_and_in_batches(tiny):
    images, rows = pictures(), [{}] * 5
    single = Mask2formerDetector(path=str(tiny), min_score=0.0, batch_size=1)
    batched = Mask2formerDetector(path=str(tiny), min_score=0.0, batch_size=4)
    for a, b in zip(single.detect(images, rows), batched.detect(images, rows), strict=True):
        assert a.keys() == b.keys() and a
        for name in a:
            np.testing.assert_allclose([o["score"] for o in a[name]], [o["score"] for o in b[name]], atol=1e-5)
            np.testing.assert_allclose([o["box"] for o in a[name]], [o["box"] for o in b[name]], atol=1)


def test_it_judges_as_the_geneval_reward_and_boxes_stay_inside_the_image(tiny):
    scorer = resolve({"type": "geneval", "mode": "partial", "detector": {"type": "mask2former", "path": str(tiny)}})
    row = {
        "tag": "counting",
        "include": [{"class": "circle", "count": 2}],
        "exclude": [{"class": "circle", "count": 3}],
    }
    scores = scorer.score(pictures(3), ["two circles"] * 3, [row] * 3)["geneval"]
    assert scores.shape == (3,) and ((scores >= 0) & (scores <= 1)).all()
    detector = Mask2formerDetector(path=str(tiny), min_score=0.0)
    for found in detector.detect(pictures(2, 40, 56), [{}] * 2):
        boxes = np.array([o["box"] for objects in found.values() for o in objects])
        assert (boxes >= 0).all() and (boxes[:, [0, 2]] <= 56).all() and (boxes[:, [1, 3]] <= 40).all()


def test_half_precision_moves_a_score_by_less_than_five_hundredths(tiny):
    images, rows = pictures(), [{}] * 5
    exact = Mask2formerDetector(path=str(tiny), min_score=0.0).detect(images, rows)
    rough = Mask2formerDetector(path=str(tiny), min_score=0.0, dtype="bfloat16").detect(images, rows)
    for a, b in zip(exact, rough, strict=True):
        best = [max(o["score"] for objects in found.values() for o in objects) for found in (a, b)]
        assert abs(best[0] - best[1]) < 0.05


def test_a_prompt_about_colours_needs_the_colour_classifier_and_says_so(tiny):
    detector = Mask2formerDetector(path=str(tiny), min_score=0.0)
    with pytest.raises(SpecError, match="give the detector `clip`"):
        detector.detect(pictures(1), [{"include": [{"class": name, "color": "red"} for name in detector_names(tiny)]}])


def detector_names(tiny):
    return list(json.loads((tiny / "config.json").read_text())["id2label"].values())


def test_a_directory_without_a_model_and_wrong_class_names_are_refused(tiny, tmp_path):
    with pytest.raises(SpecError, match=r"holds no config\.json"):
        load_detector({"type": "mask2former", "path": str(tmp_path)})
    with pytest.raises(SpecError, match="2 classes for a model of 6"):
        Mask2formerDetector(path=str(tiny), classes=["a", "b"]).setup("cpu")


def test_missing_weights_are_an_error_not_random_numbers(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SpecError, match="lacks the weights"):
        Mask2formerDetector(path=str(tmp_path)).setup("cpu")
