"""What the tiny Mask2Former is trained on, and that it learns and is saved as the real detector loads it."""

import numpy as np
import torch

from flowalign.shapes.build.detector import examples, new_detector, save_detector
from flowalign.shapes.prompts import sample_prompt, scene
from flowalign.shapes.render import render, render_with_masks
from rewards.geneval.detectors import load_detector
from rewards.geneval.detectors.palette import BACKGROUND, SHAPES, PaletteDetector


def test_masks_cover_their_objects_and_nothing_else():
    rng = np.random.default_rng(0)
    for _ in range(50):
        row = sample_prompt("train", rng)
        things = scene(row, rng)
        seed = int(rng.integers(1 << 30))
        image, masks = render_with_masks(things, np.random.default_rng(seed))
        assert (image == render(things, np.random.default_rng(seed))).all()
        painted = (image != np.array(BACKGROUND)).any(-1)
        assert len(masks) == len(things) and (masks.sum(0) <= 1).all()
        assert (painted <= (masks.sum(0) > 0)).all() and (masks.sum(0) > 0.5)[painted].mean() > 0.6


def test_examples_depend_on_seed_and_step_alone_and_hold_up_to_four_objects():
    images, masks, classes = examples(3, 64, 0)
    again, other = examples(3, 64, 0)[0], examples(4, 64, 0)[0]
    assert (images == again).all() and not (images == other).all()
    counts = [len(c) for c in classes]
    assert set(counts) == {1, 2, 3, 4} and counts == [len(m) for m in masks]
    assert {int(i) for c in classes for i in c} == set(range(len(SHAPES)))
    found = PaletteDetector().detect(images, [{}] * 64)
    seen = [sorted(shape for shape, items in objects.items() for _ in items) for objects in found]
    right = [names == sorted(SHAPES[int(i)] for i in c) for names, c in zip(seen, classes, strict=True)]
    assert 0.75 <= np.mean(right) < 1  # all but dirtied ones


def test_a_saved_detector_is_what_the_geneval_reward_loads(tmp_path):
    torch.manual_seed(0)
    save_detector(new_detector(), tmp_path)
    detector = load_detector({"type": "mask2former", "path": str(tmp_path), "min_score": 0.0})
    images = examples(0, 2, 0)[0]
    found = detector.detect(images, [{}] * 2)
    assert all(set(objects) <= set(SHAPES) and objects for objects in found)
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 10e6
