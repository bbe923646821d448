"""The text reward: its distance by hand and against a literal one, and a real reader on drawn text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from rewards import resolve as resolving
from rewards.interface import InputError, SpecError
from rewards.scorers.ocr import OcrScorer, plain, readable, similarity, wanted_text

pytest.importorskip("rapidocr", reason="needs flowalign[ocr]")
pytest.importorskip("rapidfuzz", reason="needs flowalign[ocr]")


ROOT = Path(__file__).parents[2]


def draw(*lines: str, size: int = 40, height: int = 320, width: int = 320) -> np.ndarray:
    """Black text on white, uint8 (height, width, 3)."""
    image = Image.new("RGB", (width, height), "white")
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    for i, line in enumerate(lines):
        canvas.text((size // 2, size // 2 + i * size * 3 // 2), line, fill="black", font=font)
    return np.asarray(image)


@pytest.fixture(scope="module")
def scorer() -> OcrScorer:
    loaded: Any = resolving.resolve("ocr")
    loaded.setup("cpu")
    return loaded


@pytest.mark.parametrize(
    ("wanted", "seen", "score"),
    [
        ("stop", "stop", 1),
        ("Hello World", "HELLOWORLD", 1),
        ("a b\tc\n", "A  BC", 1),
        ("stop", "the STOP sign", 1),
        ("on ice", "one coni cecream", 1),
        ("kitten", "sitting", 1 - 3 / 6),
        ("open", "opne", 1 - 2 / 4),
        ("hello", "hell", 1 - 1 / 5),
        ("hello", "helllo", 1 - 1 / 5),
        ("Café", "cafe", 1 - 1 / 4),
        ("abc", "xyz", 0),
        ("abc", "", 0),
        ("abc", "nothing of the kind", 0),
    ],
)
def test_the_score_is_one_minus_the_edit_distance_over_the_length(wanted, seen, score):
    assert similarity(wanted, seen) == pytest.approx(score, abs=1e-12)


def distance(a: str, b: str) -> int:
    """Levenshtein's, by its definition."""
    rows = [list(range(len(b) + 1))]
    for i, left in enumerate(a, 1):
        row = [i]
        for j, right in enumerate(b, 1):
            row.append(min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (left != right)))
        rows.append(row)
    return rows[-1][-1]


@given(st.text("abAB \n", max_size=8).filter(plain), st.text("abcAB ", max_size=12))
def test_the_score_is_in_0_to_1_and_follows_the_definition(wanted, seen):
    a, b = plain(wanted), plain(seen)
    expected = 1 if a in b else max(0, 1 - distance(a, b) / len(a))
    assert similarity(wanted, seen) == pytest.approx(expected, abs=1e-12)
    assert 0 <= similarity(wanted, seen) <= 1


@pytest.mark.parametrize(
    ("prompt", "metadata", "text"),
    [
        ('a sign that says "Open"', {"text": "Closed"}, "Closed"),
        ('a sign that says "Open" and "Late"', {}, "Open"),
        ("a sign that says “Open now”", {}, "Open now"),
        ("une affiche « Ouvert »", {}, " Ouvert "),
        ('a sign that says "Open"', {"text": None}, "Open"),
    ],
)
def test_the_wanted_text_comes_from_the_metadata_or_the_first_quotes(prompt, metadata, text):
    assert wanted_text(prompt, metadata) == text


@pytest.mark.parametrize(
    ("prompt", "metadata"),
    [
        ("a sign", {}),
        ('a sign with one " mark', {}),
        ('a sign that says "" and "Open"', {}),
        ('a sign that says "  "', {}),
        ('a sign that says "Open"', {"text": " "}),
        ('a sign that says "Open"', {"text": 7}),
    ],
)
def test_a_prompt_without_a_text_is_an_input_error_and_nothing_is_read(prompt, metadata):
    with pytest.raises(InputError, match=r"names no text; give metadata\.text or quote it"):
        OcrScorer().score(draw("Open")[None], [prompt], [metadata])


def test_drawn_text_is_read_an_empty_picture_scores_0_and_another_text_lies_between(scorer):
    images = np.stack([draw("WE SAY", "HELLO", "WORLD 2"), draw(), draw("HELLO", "THERE")])
    scores = scorer.score(images, ['the words "Hello World"'] * 3, [{}] * 3)["ocr"]
    np.testing.assert_allclose(scores, [1, 0, 0.5], atol=1e-12)


def test_an_image_scores_alone_as_it_does_in_a_batch(scorer):
    images = np.stack([draw("HELLO"), draw("YELLOW")])
    batch = scorer.score(images, ["p"] * 2, [{"text": "hello"}] * 2)["ocr"]
    alone = [scorer.score(image[None], ["p"], [{"text": "hello"}])["ocr"][0] for image in images]
    np.testing.assert_array_equal(batch, alone)


@pytest.mark.parametrize(
    ("size", "min_side", "expected"),
    [
        ((64, 96), 320, (320, 480)),
        ((96, 64), 320, (480, 320)),
        ((64, 96), 96, (96, 144)),
        ((64, 96), 64, (64, 96)),
        ((64, 96), 1, (64, 96)),
        ((400, 500), 320, (400, 500)),
        ((3000, 2500), 320, (3000, 2500)),
        ((100, 1000), 320, (250, 2000)),
        ((100, 1000), 50, (125, 1000)),
        ((1, 1), 320, (320, 320)),
        ((4, 3000), 320, (250, 2000)),
        ((300_000, 8), 320, (2000, 250)),
    ],
)
def test_an_image_is_enlarged_to_its_shorter_side_within_what_the_reader_can_use(size, min_side, expected):
    assert readable(np.zeros((*size, 3), np.uint8), min_side).shape == (*expected, 3)


def test_an_image_that_is_large_enough_is_read_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (330, 400, 3), dtype=np.uint8)
    np.testing.assert_array_equal(readable(image, 320), image)


@pytest.mark.slow
def test_the_text_of_a_strip_is_read(scorer):
    strip = draw("HELLO", size=20, height=44, width=800)
    assert scorer.score(strip[None], ["p"], [{"text": "hello"}])["ocr"] == [1]


def test_small_text_is_read_after_it_was_enlarged(scorer):
    small = draw("HELLO", size=16, height=32, width=80)
    assert scorer.score(small[None], ["p"], [{"text": "hello"}])["ocr"] == [1]


@pytest.mark.parametrize("module", ["rapidocr", "onnxruntime", "rapidfuzz"])
def test_without_the_extra_the_error_says_what_to_install(module):
    program = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from rewards.interface import SpecError
from rewards.resolve import resolve
scorer = resolve("ocr")
try:
    scorer.setup("cpu")
except SpecError as error:
    print(error)
"""
    command = [sys.executable, "-c", program, module]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"ocr: a library is missing (No module named '{module}'); install flowalign[ocr]\n", (
        done.stderr
    )


def test_min_side_is_at_least_one_pixel():
    with pytest.raises(SpecError, match="min_side is 0"):
        resolving.resolve({"type": "ocr", "min_side": 0})
