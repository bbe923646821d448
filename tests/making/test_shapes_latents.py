"""The captions of the embedded world's bank: a quarter of the relations are wrong, on purpose."""

import numpy as np

from flowalign.making.shapes_latents import WRONG_RELATIONS, caption
from flowalign.shapes.prompts import facts, prompts

TRAINING = {row["prompt"]: row for row in prompts("train")}


def test_so_many_captions_name_another_relation_of_the_same_objects_and_none_a_held_out_prompt() -> None:
    rng = np.random.default_rng(0)
    told = [(row, TRAINING[caption(row, rng)]) for row in prompts("train", "position") for _ in range(50)]
    wrong = [(row, other) for row, other in told if row["prompt"] != other["prompt"]]
    for row, other in wrong:
        differs = [a != b for a, b in zip(facts(row), facts(other), strict=True)]
        assert differs == [False, False, False, False, True, False]
    assert abs(len(wrong) / len(told) - WRONG_RELATIONS) < 0.02


def test_prompts_without_a_relation_are_captions_of_their_own_pictures() -> None:
    rng = np.random.default_rng(0)
    rows = [row for row in prompts("train") if row["tag"] != "position"]
    assert all(caption(row, rng) == row["prompt"] for row in rows)
