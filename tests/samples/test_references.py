"""Reference pictures: a prompt's own, opened for a reward that needs them and for nobody else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowalign.config.section import ConfigError
from flowalign.config.sections import SHIPPED, RewardConfig
from flowalign.intake.check_prompts import check_prompts
from flowalign.samples.offers import EVALUATION, PREFERENCES, TRAINING, TRY_REWARD, check_reward
from flowalign.samples.references import check_reference, references_of
from flowalign.samples.scoring import load_scorer, score_images
from rewards.interface import Asked, InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
OWN = """
class Difference:
    needs = {"references"}

    def answer(self, asked):
        return {"difference": [abs(float(a.mean()) - b.mean()) for a, b in zip(asked.images, asked.references)]}
"""


@pytest.fixture
def rows(tmp_path: Path) -> list[dict]:
    """Three prompts, two of them with one reference that is larger than the images."""
    paths = [tmp_path / name for name in ("first.png", "second.png", "first.png")]
    for value, path in enumerate(paths[:2]):
        Image.new("RGB", (40, 20), (100 * value, 0, 50)).save(path)
    return [{"prompt": "a", "task": task, "image": str(path)} for task, path in zip("xyx", paths, strict=True)]


def test_a_reward_of_ones_own_is_asked_with_the_pictures_that_its_rows_name(rows, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    named = load_scorer(RewardConfig(spec="own.py:Difference", tasks=["x"]), tmp_path)
    scores = score_images(named, Asked(IMAGES, ["a"] * 3, rows)).scores["Difference"]
    expected = np.abs(IMAGES.mean((1, 2, 3)) - 50 / 3)
    np.testing.assert_allclose(scores, [expected[0], np.nan, expected[2]])


def test_a_reference_is_as_one_reader_reads_it_and_follows_its_file(rows):
    first = references_of(rows)
    assert [one.shape for one in first] == [(20, 40, 3)] * 3 and first[0][0, 0].tolist() == [0, 0, 50]
    with pytest.raises(ValueError, match="read-only"):
        first[0][0, 0] = 1
    Image.new("RGBA", (4, 6), (0, 0, 0, 0)).save(rows[0]["image"])
    assert (references_of(rows[:1])[0] == 255).all()


def test_a_row_without_a_reference_is_named(rows, tmp_path):
    for row, said in (
        ({"prompt": "a red dog"}, "'a red dog' names no reference picture in its `image`"),
        ({"prompt": "a", "image": str(tmp_path / "none.png")}, r"none\.png cannot be had \(No such file"),
        ({"prompt": "a", "image": __file__}, r"test_references\.py cannot be had"),
    ):
        with pytest.raises(InputError, match=said):
            references_of([*rows, row])


def test_a_file_that_begins_as_no_picture_does_is_refused_before(rows, tmp_path):
    for name, content, said in (
        ("page.png", b"<!doctype html>", r"page\.png is a web page; only PNG"),
        ("empty.png", b"", r"empty\.png is no image file: it is empty"),
        ("camera.png", b"\x00\x00\x00\x18ftypheic", r"camera\.png is "),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=said):
            check_reference({"prompt": "a", "image": str(tmp_path / name)})
    with pytest.raises(InputError, match="is no file"):
        check_reference({"prompt": "a", "image": str(tmp_path)})
    check_reference(rows[0])


def test_runs_evaluations_and_preferences_offer_references_and_rows_without_are_refused_before(tmp_path):
    reward = RewardConfig(spec="image_similarity", options={"path": str(SHIPPED / "pickscore")})
    for offers in (TRAINING, EVALUATION, PREFERENCES):
        check_reward("rewards.0", reward, tmp_path, offers)
    with pytest.raises(ConfigError, match="needs 'references', which try-reward does not offer"):
        check_reward("rewards.0", reward, tmp_path, TRY_REWARD)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "image": "a.png"}\n{"prompt": "b"}\n')
    with pytest.raises(ConfigError, match=r'line 2: has no "image", the path of its reference picture'):
        check_prompts("data.prompts", str(tmp_path / "prompts.jsonl"), [reward])
