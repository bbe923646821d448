"""The average of an engine's weights, in this process; those of shards are in the tests of their engines."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowalign.engine.average import Average
from flowalign.engine.base import Engine, EngineSettings
from flowalign.engine.build import build_engine


def engine_of(*weights: float, dtype: torch.dtype = torch.float32) -> tuple[Engine, nn.Parameter]:
    network = nn.Module()
    network.w = nn.Parameter(torch.tensor(weights, dtype=dtype))
    return build_engine(network, EngineSettings("torch")), network.w


def test_the_average_follows_the_closed_form() -> None:
    engine, weight = engine_of(0.0, 0.0)
    average = Average(engine, 0.9)
    weight.data.fill_(1.0)
    for _ in range(5):
        average.update()
    torch.testing.assert_close(average.weights()["w"], torch.full((2,), 1 - 0.9**5))


def test_nothing_it_gives_or_takes_is_aliased() -> None:
    engine, weight = engine_of(0.0, 0.0)
    average = Average(engine, 0.5)
    weight.data.fill_(8.0)
    average.weights()["w"].fill_(8.0)
    loaded = {"w": torch.zeros(2)}
    average.load(loaded)
    loaded["w"].fill_(8.0)
    assert torch.equal(average.weights()["w"], torch.zeros(2))


def test_the_average_of_half_precision_weights_is_float32() -> None:
    engine, weight = engine_of(1.0, dtype=torch.bfloat16)
    average = Average(engine, 0.999)
    weight.data.fill_(0.0)
    average.update()
    assert average.weights()["w"].dtype == torch.float32
    assert average.weights()["w"].item() == pytest.approx(0.999)


def test_a_saved_and_loaded_average_continues_bitwise() -> None:
    engine, weight = engine_of(*torch.rand(5).tolist())
    average = Average(engine, 0.9)
    weight.data.copy_(torch.rand(5))
    other = Average(engine, 0.9)
    other.load(average.weights())
    weight.data.copy_(torch.arange(5.0))
    for each in (average, other):
        each.update()
    assert torch.equal(average.weights()["w"], other.weights()["w"])


def test_the_network_holds_the_average_inside_and_its_own_weights_again_after_a_failure() -> None:
    engine, weight = engine_of(1.0, 2.0)
    average = Average(engine, 0.5)
    weight.data.copy_(torch.tensor([3.0, 6.0]))
    average.update()
    with pytest.raises(KeyError), average.bound():
        assert weight.tolist() == [2.0, 4.0]
        raise KeyError
    assert weight.tolist() == [3.0, 6.0]
    assert average.weights()["w"].tolist() == [2.0, 4.0]


def test_weights_that_do_not_fit_are_refused() -> None:
    engine, _ = engine_of(0.0, 0.0)
    average = Average(engine, 0.9)
    for wrong in ({}, {"v": torch.zeros(2)}, {"w": torch.zeros(3)}):
        with pytest.raises(ValueError, match=r"do not fit|has shape"):
            average.load(wrong)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        Average(engine, 1.5)
