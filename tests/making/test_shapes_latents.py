"""The captions of the embedded world's bank: a quarter of the relations are wrong, on purpose."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowalign.config.sections import ModelConfig
from flowalign.data.banks.latents import load_bank
from flowalign.making.shapes_latents import WRONG_RELATIONS, caption, make_bank
from flowalign.models.build import load_encoders
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


def test_a_bank_has_as_many_pictures_as_were_asked_for(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    """Seven in batches of four: the last batch is short, and no picture is left out."""
    encoders = load_encoders(ModelConfig(path=str(tiny_pipeline_dir)), text=False)
    make_bank(encoders, tmp_path / "bank", num_images=7, batch=4)
    assert len(load_bank(tmp_path / "bank")) == 7


@pytest.mark.parametrize("asked", [{"num_images": 0}, {"duplicates": 1.5}, {"wrong_relations": -0.1}], ids=str)
def test_what_no_bank_can_be_is_refused_before_anything_is_made(asked: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a bank has 1 image or more, and shares are in \[0, 1\]"):
        make_bank(None, tmp_path / "bank", **asked)  # type: ignore[arg-type]
    assert not (tmp_path / "bank").exists()


def test_relations_can_all_be_right_or_all_wrong() -> None:
    rows, rng = prompts("train", "position"), np.random.default_rng(0)
    assert all(caption(row, rng, 0.0) == row["prompt"] for row in rows)
    assert sum(caption(row, rng, 1.0) != row["prompt"] for row in rows) > 0.9 * len(rows)
