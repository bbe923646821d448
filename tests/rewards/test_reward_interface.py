from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowalign.samples.scoring import NamedScorer, bounded, score_images
from rewards.composite import combine
from rewards.interface import (
    Asked,
    InputError,
    InvalidScores,
    ScorerFailed,
    check_inputs,
    score_batch,
    set_up,
    validate_scores,
)

IMAGES = np.zeros((3, 4, 4, 3), np.uint8)


class Fixed:
    def __init__(self, answer) -> None:
        self.answer = answer

    def score(self, images, prompts, metadata):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def run(answer):
    return score_batch("mine", Fixed(answer), Asked(IMAGES, ["p"] * 3, [{}] * 3))


def test_lists_integers_and_booleans_become_float_arrays():
    checked = run({"a": [1, 2, 3], "b": np.array([True, False, True])})
    assert checked.scores["a"].dtype == np.float64
    np.testing.assert_array_equal(checked.scores["b"], [1, 0, 1])
    assert all(valid.all() for valid in checked.valid.values())
    assert checked.causes == {"a": {}, "b": {}}


def test_what_a_masked_array_masks_is_no_score():
    for masked in (np.ma.masked_equal([1.0, 2.0, 3.0], 2.0), np.ma.masked_equal([1, 2, 3], 2)):
        checked = validate_scores("x", {"a": masked}, 3)
        assert checked.valid["a"].tolist() == [True, False, True] and np.isnan(checked.scores["a"][1])
    checked = validate_scores("x", {"a": np.ma.masked_array([1.0, 2.0, 3.0])}, 3)
    assert checked.scores["a"].tolist() == [1.0, 2.0, 3.0]


def test_nan_inf_and_huge_scores_are_masked_one_by_one_and_counted():
    checked = validate_scores("mine", {"a": [np.nan, np.inf, -np.inf, 1e30, -1e7, 1e6, 0.5]}, 7)
    np.testing.assert_array_equal(checked.valid["a"], [False] * 5 + [True] * 2)
    assert checked.causes == {"a": {"nan": 1, "inf": 2, "magnitude": 2}}


def test_a_refused_sample_is_nan_and_never_zero():
    checked = validate_scores("mine", {"a": [np.inf, 1e30, np.nan]}, 3)
    assert np.isnan(checked.scores["a"]).all()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"a": [1.0, 2.0]}, r"'mine'.*'a'.*shape \(2,\) for 3 images"),
        ({"a": [[1.0], [2.0], [3.0]]}, r"shape \(3, 1\)"),
        ({"a": 1.0}, r"shape \(\)"),
        ({"a": ["good", "bad", "good"]}, r"'mine'.*'good'"),
        ({"a": [None, 1.0, 2.0]}, "object"),
        ({"a": [1 + 2j, 0, 0]}, "complex"),
        ({"a": [[1.0], [2.0, 3.0], []]}, "not an array of numbers"),
        ({"a": ([1.0, 2.0, 3.0], {})}, "a tuple of scores and a dict; return 3 floats alone"),
        ({}, "an empty dict"),
        ([1.0, 2.0, 3.0], "returned list"),
        ({3: [1.0, 2.0, 3.0]}, "non-empty strings"),
    ],
)
def test_a_wrong_length_or_type_is_refused_with_the_scorers_name(answer, said):
    with pytest.raises(InvalidScores, match=said) as caught:
        run(answer)
    assert "'mine'" in str(caught.value)


def test_a_raising_scorer_is_named_with_its_error_and_line():
    with pytest.raises(ScorerFailed, match=r"'mine' raised ZeroDivisionError: oh no .*test_reward_interface.py, line"):
        run(ZeroDivisionError("oh\nno"))


@pytest.mark.parametrize("images", [IMAGES.astype(np.float32), IMAGES[0], IMAGES[..., :2], IMAGES.tolist(), IMAGES[:0]])
def test_images_that_are_not_uint8_nhw3_are_refused(images):
    with pytest.raises(InputError):
        check_inputs(Asked(images, ["p"] * 3, [{}] * 3))


def test_unequal_numbers_of_images_and_prompts_are_refused():
    with pytest.raises(InputError, match="3 images, 2 prompts, 3 metadata"):
        check_inputs(Asked(IMAGES, ["p"] * 2, [{}] * 3))


def test_weighted_sum_by_hand_and_valid_only_where_every_weighted_reward_is():
    scores = {"a": np.array([1.0, np.nan, 3.0]), "b": np.array([10.0, 20.0, np.nan]), "gold": np.full(3, np.nan)}
    valid = {name: ~np.isnan(array) for name, array in scores.items()}
    total, ok = combine(scores, {"a": 2.0, "b": -0.5, "gold": 0.0}, valid)
    np.testing.assert_array_equal(ok, [True, False, False])
    np.testing.assert_array_equal(total, [-3.0, np.nan, np.nan])


def test_a_weighted_reward_without_scores_is_an_error():
    with pytest.raises(InvalidScores, match="'b'"):
        combine({"a": np.ones(2)}, {"b": 1.0}, {"a": np.ones(2, bool)})
    with pytest.raises(InvalidScores, match="weight other than 0"):
        combine({"a": np.ones(2)}, {"a": 0.0}, {"a": np.ones(2, bool)})


@given(st.lists(st.floats(width=64), min_size=1, max_size=20))
def test_valid_scores_are_untouched_and_causes_add_up(values):
    checked = validate_scores("mine", {"a": values}, len(values))
    valid = checked.valid["a"]
    np.testing.assert_array_equal(checked.scores["a"][valid], np.array(values)[valid])
    assert sum(checked.causes["a"].values()) == (~valid).sum()
    assert (np.abs(checked.scores["a"][valid]) <= 1e6).all()


def test_what_a_users_setup_raises_is_named_with_its_line():
    class Fragile:
        def setup(self, device):
            raise FileNotFoundError("weights.bin")

        def score(self, images, prompts, metadata):
            return {}

    with pytest.raises(ScorerFailed, match=r"'Fragile' raised FileNotFoundError in setup: weights\.bin \(.*line \d+\)"):
        set_up(Fragile(), "cpu")


class Leaves(Mapping):
    """An answer that ends the process where it is asked ``how``."""

    def __init__(self, how, error):
        self.how, self.error = how, error

    def _at(self, how):
        if how == self.how:
            raise self.error

    def __getitem__(self, key):
        self._at("item")
        return self if self.how == "array" else [0.0, 0.0, 0.0]

    def __len__(self):
        self._at("length")
        return 1

    def __iter__(self):
        self._at("iteration")
        return iter(["mine"])

    def keys(self):
        self._at("keys")
        return super().keys()

    def items(self):
        self._at("items")
        return super().items()

    def __array__(self, *args, **kwargs):
        self._at("array")


class Unsaid(Exception):
    def __str__(self):
        raise SystemExit(0)


@pytest.mark.parametrize("error", [SystemExit(0), CancelledError(), GeneratorExit(), MemoryError("m"), Unsaid()])
@pytest.mark.parametrize("how", ["item", "length", "iteration", "items", "array"])
def test_an_answer_that_raises_while_it_is_read_is_named(how, error):
    with pytest.raises(ScorerFailed, match=rf"reward 'mine' raised {type(error).__name__} while its answer was read"):
        run(Leaves(how, error))


def test_an_error_without_a_text_keeps_the_reward_s_name():
    with pytest.raises(ScorerFailed, match=r"reward 'mine' raised Unsaid: its text raised SystemExit \("):
        run(Unsaid())


class Attributes:
    """A scorer that raises where this attribute of it is asked for."""

    def __init__(self, name):
        self.asked = name

    def __getattr__(self, name):
        if name == self.__dict__["asked"]:
            raise SystemExit(0)
        raise AttributeError(name)

    def score(self, images, prompts, metadata):
        return {"mine": [0.0] * len(images)}


@pytest.mark.parametrize("name", ["name", "retried", "setup"])
def test_a_scorer_whose_attributes_raise_is_named(name):
    scorer = NamedScorer("mine", 1.0, Attributes(name))
    with pytest.raises(ScorerFailed, match=r"reward '(mine|Attributes)' raised SystemExit"):
        set_up(scorer.scorer, "cpu")
        score_images(scorer, Asked(IMAGES, ["p"] * 3, [{}] * 3))


def test_metadata_that_holds_itself_is_refused():
    row = {}
    row["row"] = row
    with pytest.raises(InputError, match="metadata is nested too deeply"):
        score_batch("mine", Fixed({"mine": [0.0] * 3}), Asked(IMAGES, ["p"] * 3, [row] * 3))


def test_a_keyboard_interrupt_of_an_answer_is_none_of_the_user():
    answer = Leaves("items", KeyboardInterrupt())
    with pytest.raises(ScorerFailed, match="raised KeyboardInterrupt while its answer was read"):
        bounded("mine", lambda: run(answer), 60.0)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ([f"k{i}" for i in range(65)], "reward 'mine' returned more than 64 scores"),
        (["k" * 201], "reward 'mine' returned a key of 201 letters"),
    ],
)
def test_more_scores_or_letters_than_a_report_could_show_are_refused(keys, said):
    with pytest.raises(InvalidScores, match=said):
        run({key: [0.0] * 3 for key in keys})
    assert len(run({key[:200]: [0.0] * 3 for key in keys[:64]}).scores) == min(len(keys), 64)
