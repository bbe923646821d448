"""The shipped colour classifier and what it is trained on."""

import numpy as np
import torch

from flowalign.config.sections import SHIPPED
from flowalign.shapes.build.colors import objects
from rewards.geneval.colors import ZeroShotColors
from rewards.geneval.detectors.palette import COLORS, SHAPES


def test_objects_are_cut_out_on_grey_and_depend_on_seed_and_step_alone():
    crops, things = objects(5, 40, 0)
    again = objects(5, 40, 0)
    assert all((a == b).all() for a, b in zip(crops, again[0], strict=True)) and things == again[1]
    assert {thing.shape for thing in things} == set(SHAPES) and {thing.color for thing in things} == set(COLORS)
    round_ones = [one for one, thing in zip(crops, things, strict=True) if thing.shape == "circle"]
    assert round_ones and all((one[0, 0] == 0x99).all() for one in round_ones)  # a corner is ground
    assert all(one.shape[0] < 40 and one.shape[1] < 40 for one in crops)


def test_the_shipped_classifier_names_the_colours_of_objects_it_was_not_trained_on():
    torch.set_num_threads(1)
    colors = ZeroShotColors(names=list(COLORS), path=str(SHIPPED / "colors"))
    colors.setup("cpu")
    crops, things = objects(0, 100, 12345)
    named = [
        colors.classify(one, [(0, 0, one.shape[1], one.shape[0])], [(one != 0x99).any(-1)], thing.shape)[0]
        for one, thing in zip(crops, things, strict=True)
    ]
    assert np.mean([name == thing.color for name, thing in zip(named, things, strict=True)]) > 0.95
