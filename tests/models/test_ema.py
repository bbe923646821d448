from __future__ import annotations

import pytest
import torch

from flowalign.models.ema import Ema


def test_the_average_follows_the_closed_form() -> None:
    ema = Ema({"w": torch.zeros(2)}, decay=0.9)
    for _ in range(5):
        ema.update({"w": torch.ones(2)})
    torch.testing.assert_close(ema.state()["w"], torch.full((2,), 1 - 0.9**5))


def test_nothing_it_gives_or_takes_is_aliased() -> None:
    weights = {"w": torch.zeros(2)}
    ema = Ema(weights, decay=0.5)
    weights["w"].fill_(8.0)
    ema.state()["w"].fill_(8.0)
    loaded = {"w": torch.zeros(2)}
    ema.load(loaded)
    loaded["w"].fill_(8.0)
    assert torch.equal(ema.state()["w"], torch.zeros(2))


def test_the_shadow_of_half_precision_weights_is_float32() -> None:
    ema = Ema({"w": torch.ones(1, dtype=torch.bfloat16)}, decay=0.999)
    ema.update({"w": torch.zeros(1, dtype=torch.bfloat16)})
    assert ema.state()["w"].dtype == torch.float32
    assert ema.state()["w"].item() == pytest.approx(0.999)


def test_a_saved_and_loaded_average_continues_bitwise() -> None:
    ema, other = Ema({"w": torch.rand(5)}, 0.9), Ema({"w": torch.rand(5)}, 0.9)
    other.load(ema.state())
    for average in (ema, other):
        average.update({"w": torch.arange(5.0)})
    assert torch.equal(ema.state()["w"], other.state()["w"])


def test_weights_that_do_not_fit_are_refused() -> None:
    ema = Ema({"w": torch.zeros(2)}, 0.9)
    for wrong in ({}, {"v": torch.zeros(2)}, {"w": torch.zeros(3)}):
        with pytest.raises(ValueError, match="do not fit"):
            ema.update(wrong)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        Ema({}, 1.5)
